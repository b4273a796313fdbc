"""What callers get wrong, and that the message names the argument and the way out."""

from typing import Any

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

import bidistill_kernels as bk
from bidistill_kernels import LogitTransform

x, w, y, v = torch.randn(4, 3), torch.randn(9, 3), torch.randn(4, 2), torch.randn(9, 2)
target = torch.zeros(4, dtype=torch.int64)
ids = torch.arange(8).view(4, 2)
trained = torch.randn(9, 2, requires_grad=True)


# Any: these calls are wrong on purpose
def kl(x: Any = x, w: Any = w, y: Any = y, v: Any = v, target: Any = None, **options: Any):
    return bk.linear_bidirectional_kl(x, w, y, v, target, **options)


def jsd(**options: Any):
    return bk.linear_jsd(x, w, y, v, **options)


def push_pull(**options: Any):
    return bk.linear_push_pull(x, w, y, v, **options)


def stored(ids: Any = ids, values: Any = y):
    return bk.linear_topk_kl(x, w, bk.TopK(ids, values))


def cross_entropy(**options: Any):
    return bk.linear_cross_entropy(x, w, target, **options)


REJECTED = {
    "three dimensions": (lambda: kl(x[None]), ValueError, r"student_hidden: .*flatten batch"),
    "width": (lambda: kl(w=v), ValueError, r"student_weight: .*expected \(vocabulary, 3\)"),
    "rows": (lambda: kl(y=y[:3]), ValueError, r"teacher_hidden: got 3 rows, expected 4"),
    "vocabulary": (lambda: kl(v=v[:8]), ValueError, r"teacher_weight: .*of 8.*9.*vocab_limit"),
    "vocabulary of logits": (
        lambda: bk.jsd(torch.zeros(4, 9), torch.zeros(4, 8)),
        ValueError,
        r"teacher_logits: .*of 8.*9.*vocab_limit",
    ),
    "empty head": (lambda: kl(w=w[:0], v=v[:0]), ValueError, "student_weight: .*sharded"),
    "bias": (lambda: kl(student_bias=w[0]), ValueError, r"student_bias: .*expected \(9,\)"),
    "integers": (lambda: kl(w.to(torch.int8), w), TypeError, "student_hidden: .*dequantise"),
    "no tensor": (lambda: kl(y=[[1.0]]), TypeError, "teacher_hidden: got list"),
    "device": (lambda: kl(v=v.to("meta")), ValueError, "teacher_weight: got device meta"),
    "trainable teacher": (lambda: kl(v=trained), ValueError, r"teacher_weight.detach\(\)"),
    "target shape": (lambda: kl(target=target[:3]), ValueError, r"target: .*expected \(4,\)"),
    "target dtype": (lambda: kl(target=target.float()), TypeError, "target: .*int64"),
    "no target": (lambda: kl(cross_entropy=1.0), ValueError, "target: got None"),
    "weight shape": (lambda: kl(token_weight=x), ValueError, r"token_weight: .*expected \(4,\)"),
    "trained weight": (
        lambda: kl(token_weight=torch.ones(4, requires_grad=True)),
        ValueError,
        r"token_weight.detach\(\)",
    ),
    "reduction": (lambda: kl(reduction="avg"), ValueError, "'avg', expected one of 'mean'"),
    "num_items": (lambda: kl(reduction="sum", num_items=3), ValueError, "num_items: .*'sum'"),
    "chunk_bytes": (lambda: kl(chunk_bytes=0), ValueError, "chunk_bytes: got 0"),
    "triton in fp64": (
        lambda: kl(*(t.double() for t in (x, w, y, v)), backend="triton"),
        ValueError,
        "backend: got 'triton', which (computes in float32|is not installed).*'auto'",
    ),
    "bias of logits": (
        lambda: bk.jsd(w, w, student_bias=w[0]),
        ValueError,
        "student_bias: got one beside student_logits",
    ),
    "no head": (lambda: kl(w=None), TypeError, "student_weight: got None.*without linear_"),
    "no teacher head": (lambda: kl(v=None), TypeError, "teacher_weight: got None"),
    "no head to store": (lambda: bk.topk_log_probs(y, None, 2), TypeError, "teacher_weight: got"),  # pyright: ignore
    "stored for a dense loss": (
        lambda: kl(y=bk.TopK(ids, y)),
        TypeError,
        "teacher_hidden: got TopK, expected a tensor",
    ),
    "logits for a store": (lambda: bk.topk_kl(w, w), TypeError, "teacher: got Tensor.*TopK"),  # pyright: ignore
    "no labels": (lambda: bk.cross_entropy(w, None), ValueError, "target: got None"),  # pyright: ignore
    "target list": (lambda: kl(target=[0, 1, 2, 3]), TypeError, "target: got list"),
    "weight list": (lambda: kl(token_weight=[1.0]), TypeError, "token_weight: got list"),
    "complex weight": (
        lambda: kl(token_weight=torch.ones(4, dtype=torch.complex64)),
        TypeError,
        "token_weight: got torch.complex64",
    ),
    "no transform": (
        lambda: kl(student_transform={}),
        TypeError,
        "student_transform: got dict, expected a LogitTransform",
    ),
    "no items": (lambda: kl(num_items=0), ValueError, "num_items: got 0"),
    "items of each row": (lambda: kl(num_items=torch.ones(4)), ValueError, r"num_items: .*scalar"),
    "half a limit": (lambda: LogitTransform(vocab_limit=2.5), TypeError, "vocab_limit: got 2.5"),  # pyright: ignore
    "stored shape": (lambda: stored(values=y[:, :1]), ValueError, r"teacher.values: .*\(4, 2\)"),
    "stored rows": (lambda: stored(ids=ids[:3]), ValueError, r"teacher.ids: .*\(4, K\)"),
    "stored dtype": (lambda: stored(ids=ids.int()), TypeError, r"teacher.ids: .*int64"),
    "stored values": (lambda: stored(values=ids), TypeError, r"teacher.values: .*float"),
    "native in fp64": (
        lambda: kl(*(t.double() for t in (x, w, y, v)), backend="native"),
        ValueError,
        "backend: got 'native', which computes in float32.*'auto'",
    ),
    "backend": (lambda: kl(backend="cuda"), ValueError, "backend: got 'cuda', expected one of"),
    "negative": (lambda: kl(forward=-1), ValueError, "forward: got -1"),
    "nan": (lambda: kl(reverse=float("nan")), ValueError, "reverse: got nan"),
    "all zero": (lambda: kl(forward=0, reverse=0), ValueError, "forward: got weights that are"),
    "text": (lambda: kl(forward="0.5"), TypeError, "forward: got '0.5', expected a number"),
    "beta 0": (lambda: jsd(beta=0.0), ValueError, "beta: got 0.0"),
    "beta 1": (lambda: jsd(beta=1), ValueError, "beta: got 1"),
    "k": (lambda: push_pull(k_pull=0), ValueError, "k_pull: got 0"),
    "fraction": (lambda: push_pull(k_push=1.5), TypeError, "k_push: .*whole"),
    "delta": (lambda: push_pull(delta=0.0), ValueError, "delta: got 0.0"),
    "reading": (
        lambda: push_pull(reading="P2"),
        ValueError,
        "reading: got 'P2', expected one of 'hinge'",
    ),
    "teacher of one model": (
        lambda: cross_entropy(teacher_bias=w[:, 0]),
        TypeError,
        "teacher_bias: got one, expected none",
    ),
    "scale": (lambda: LogitTransform(scale=0.0), ValueError, "scale: got 0.0"),
    "softcap": (lambda: LogitTransform(softcap=0.0), ValueError, "softcap: .*None"),
    "temperature": (lambda: LogitTransform(temperature=-1.0), ValueError, "temperature: got -1"),
    "vocab_limit": (lambda: LogitTransform(vocab_limit=0), ValueError, "vocab_limit: got 0"),
}


@pytest.mark.parametrize(("call", "error", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_accepts_a_trainable_teacher_where_nothing_is_trained():
    with torch.no_grad():
        assert kl(v=trained).isfinite()


def test_rejects_a_dtensor(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(w, mesh)
        with pytest.raises(TypeError, match=r"student_weight: got a DTensor.*root module"):
            kl(w=sharded)
    finally:
        dist.destroy_process_group()


def test_a_vocabulary_limit_reconciles_two_heads():
    padded = torch.cat([v, torch.full((3, 2), 7.0)])
    limit = LogitTransform(vocab_limit=9)
    assert torch.equal(kl(v=padded, teacher_transform=limit), kl())

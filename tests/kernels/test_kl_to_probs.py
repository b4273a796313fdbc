"""KL to given probabilities: the definition, the fused form on the head, and edges."""

import math

import pytest
import torch

from bidistill_kernels import (
    LinearKLToProbs,
    LogitTransform,
    bidirectional_kl_reference,
    kl_to_probs_reference,
    linear_kl_to_probs,
)
from bidistill_kernels._loss import fused_loss
from tests.kernels.cases import DEVICE, make_inputs
from tests.kernels.test_memory import peak_bytes
from tests.support import assert_close

inf = torch.inf
V = 300


def probs_of(inputs):
    return (inputs.teacher_hidden @ inputs.teacher_weight.T).softmax(-1)


def on_logits(logits, probs, eps=1e-10):
    """The loss of logits that exist: an infinite one cannot be the product with a head."""
    sides = (logits,), (probs,)
    return fused_loss("kl_to_probs", [eps], *sides, None, reduction="none", backend="torch")


def test_reference_matches_definition():
    """By hand: q = (3/4, 1/4, 0) against (1/2, 1/4, 1/4)."""
    student = torch.tensor([[2.0, 1.0, 1.0]]).log()
    q = torch.tensor([[0.75, 0.25, 0.0]])
    expected = 0.75 * math.log(1.5)
    torch.testing.assert_close(kl_to_probs_reference(student, q), torch.tensor([expected]))


def test_is_the_forward_kl_where_probabilities_add_up():
    inputs = make_inputs(6, 40)
    student, teacher = (inputs[i] @ inputs[i + 1].T for i in (0, 2))
    expected = bidirectional_kl_reference(student, teacher, forward=1.0, reverse=0.0)
    torch.testing.assert_close(kl_to_probs_reference(student, teacher.softmax(-1)), expected)


def test_gradcheck():
    """Also of rows that do not add up to 1, and with zeros and a bound that bites."""
    s = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    q = torch.rand(4, 7, dtype=torch.float64)
    q[0, 2], q[1] = 0, q[1] / q[1].sum()
    assert torch.autograd.gradcheck(lambda s: kl_to_probs_reference(s, q, eps=0.1), s)
    assert torch.autograd.gradcheck(lambda s: on_logits(s, q, eps=0.1), s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_bytes", [None, 3 * 2 * V * 4], ids=["one", "chunks"])
def test_fused_with_transform_and_bias(dtype, chunk_bytes, backend):
    inputs = make_inputs(9, V)
    probs = probs_of(inputs).to(dtype)
    x, w, _, _, target = inputs.to(dtype)
    bias = torch.randn(V, device=x.device).to(dtype).requires_grad_()
    transform = LogitTransform(scale=1.3, softcap=9.0, temperature=1.5)
    options = {"student_bias": bias, "student_transform": transform, "chunk_bytes": chunk_bytes}
    options["backend"] = backend
    loss = linear_kl_to_probs(x, w, probs, target, reduction="sum", **options)
    got = [loss, *torch.autograd.grad(loss, (x, w, bias))]

    def eager(dtype):
        leaves = x64, w64, b64 = [a.detach().to(dtype).requires_grad_() for a in (x, w, bias)]
        rows = kl_to_probs_reference(transform(x64 @ w64.T + b64), probs.to(dtype))
        total = rows[target != -100].sum()
        return [total, *torch.autograd.grad(total, leaves)]

    results = zip(
        ("loss", "dX", "dW", "dbias"), got, *map(eager, (torch.float64, torch.float32)), strict=True
    )
    for name, actual, expected64, own in results:
        assert_close(name, actual, expected64, own.to(actual.dtype))


def test_per_row_and_frozen_head(backend):
    """The other operation: rows with an upstream gradient of their own."""
    inputs = make_inputs(9, V).to(torch.float32)
    probs, upstream = probs_of(inputs), torch.rand(9, device=inputs.student_hidden.device)
    x, w, target = inputs.student_hidden, inputs.student_weight.detach(), inputs.target
    rows = linear_kl_to_probs(x, w, probs, target, reduction="none", backend=backend)

    def eager(dtype):
        h = x.detach().to(dtype).requires_grad_()
        loss = kl_to_probs_reference(h @ w.to(dtype).T, probs.to(dtype))
        loss = loss.masked_fill(target == -100, 0)
        return loss, *torch.autograd.grad(loss @ upstream.to(dtype), h)

    got = rows, *torch.autograd.grad(rows @ upstream, x)
    for name, *values in zip(
        ("loss", "dX"), got, *map(eager, (torch.float64, torch.float32)), strict=True
    ):
        assert_close(name, *values)


SIXTEEN = torch.bfloat16, torch.float16


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=str)
def test_probabilities_of_any_dtype(kept, dtype, backend):
    """Beside hidden states of another: they are read as they are, with zeros and without a norm."""
    inputs = make_inputs(6, V)
    mass = torch.linspace(0, 1.5, 6, dtype=torch.float64, device=DEVICE)
    probs = probs_of(inputs) * mass[:, None]
    probs[:, ::3] = 0
    given = [probs.to(kind) for kind in (torch.float64, torch.float32, *SIXTEEN)]
    rounded = inputs.to(dtype)
    weight, options = rounded.student_weight, {"backend": backend, "eps": 1e-4}
    upstream = torch.rand(6, device=DEVICE)
    for q in given:
        x, w = rounded.student_hidden, weight if kept else weight.detach()
        rows = linear_kl_to_probs(x, w, q, reduction="none", **options)
        got = rows, *torch.autograd.grad(rows @ upstream, [x, w][: 1 + kept])
        results = []
        for wide in (torch.float64, torch.float32):
            leaves = [leaf.detach().to(wide).requires_grad_() for leaf in (x, w)]
            loss = kl_to_probs_reference(leaves[0] @ leaves[1].T, q.to(wide), eps=1e-4)
            leaves = leaves[: 1 + kept]
            results.append((loss, *torch.autograd.grad(loss @ upstream.to(wide), leaves)))
        for name, actual, exact, own in zip(("loss", "dX", "dW"), got, *results, strict=False):
            assert_close(name, actual, exact, own.to(actual.dtype))


def test_ignored_rows_and_none(backend):
    """Rows that are left out may hold anything."""
    inputs = make_inputs(9, V).to(torch.float32)
    x, w, *_, target = inputs
    probs, counts = probs_of(inputs), target != -100
    probs[~counts] = torch.nan
    loss = linear_kl_to_probs(x, w, probs, target, backend=backend)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert counts.any()
    assert not counts.all()
    assert not dx[~counts].any()
    alone = linear_kl_to_probs(x[counts], w, probs[counts], backend=backend)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close((dx, dw), torch.autograd.grad(alone, (x, w)))
    loss = linear_kl_to_probs(x, w, probs, torch.full_like(target, -100), backend=backend)
    assert not loss
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (x, w)))


def test_masked_ids_and_nan():
    s, q = torch.randn(5, 20), torch.rand(5, 20)
    s[0, 3], q[0, 3] = -inf, 0  # ruled out by both
    s[1, 3] = -inf  # by the student alone
    q[2, 4], s[3, 5], q[4, 6] = torch.nan, torch.nan, inf
    s.requires_grad_()
    loss = on_logits(s, q)
    torch.testing.assert_close(loss[0], kl_to_probs_reference(s, q)[0])
    assert loss[1] == inf
    assert loss[2:].isnan().all()
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    assert gradient[0].isfinite().all()
    assert gradient[2:].isnan().all()


def test_statistics_and_module():
    inputs = make_inputs(5, 20).to(torch.float32)
    x, w, *_, target = inputs
    probs = probs_of(inputs)
    loss, stats = LinearKLToProbs(return_stats=True)(x, w, probs, target)
    assert torch.equal(loss, linear_kl_to_probs(x, w, probs, target))
    counts = target != -100
    torch.testing.assert_close(loss, stats.per_token[counts].mean())
    lse = (x @ w.T).logsumexp(-1).masked_fill(~counts, 0)
    torch.testing.assert_close(stats.student_lse, lse.detach())


@pytest.mark.parametrize("backend", ["torch", "native"], indirect=True)
def test_never_holds_all_logits(backend):
    """Beside the probabilities that it is given: chunks, and gradients as wide as the model."""
    N, D, V, chunk_bytes = 1024, 32, 4096, 1 << 20
    x, w = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    probs = torch.randn(N, V).softmax(-1)
    options = {"chunk_bytes": chunk_bytes, "backend": backend}
    peak = peak_bytes(lambda: linear_kl_to_probs(x, w, probs, **options).backward())
    assert chunk_bytes < peak < 4 * N * V / 2


REJECTED = {
    "eps": ({"eps": -1.0}, ValueError, "eps: got -1.0"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
    "teacher": (
        {"teacher_transform": LogitTransform(temperature=2.0)},
        TypeError,
        "teacher_transform: got one, expected none; this teacher has no head",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects(options, error, message):
    inputs = make_inputs(3, 20).to(torch.float32)
    with pytest.raises(error, match=message):
        linear_kl_to_probs(*inputs[:2], probs_of(inputs), **options)

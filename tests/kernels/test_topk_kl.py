"""KL to a stored teacher: the definition, relations between the two tails and full KL, edges.

Shapes (N, V) of the fused form: (1, 1); odd (7, 1423), where K = 64 leaves most ids in the tail.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from bidistill_kernels import LogitTransform, bidirectional_kl_reference
from bidistill_kernels._rows import ROW_LOSSES, Chunk, TopK
from bidistill_kernels._stored import top_log_probs
from bidistill_kernels._torch_rows import TorchLogits
from bidistill_kernels.topk_kl import (
    LinearTopKKL,
    linear_topk_kl,
    topk_kl,
    topk_kl_reference,
    topk_log_probs,
)
from tests.kernels.cases import DEVICE, make_inputs
from tests.support import assert_close

inf = torch.inf
V, K = 30, 6
TAILS: Any = ("bucket", "renormalize")
MIXES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "mix": (0.3, 0.7)}
each_tail = pytest.mark.parametrize("tail", TAILS)
each_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)


def weights(mix):
    return dict(zip(("forward", "reverse"), mix, strict=True))


def rows(student, teacher, **options):
    return topk_kl(student, teacher, reduction="none", **options)


def draw(seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, V, generator=g, dtype=torch.float64) * spread for _ in range(2)]


def store(logits, k=K):
    """The k best ids of each row and their log-probabilities."""
    values, ids = logits.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    return TopK(ids[:, :k], values[:, :k])


def gradient(student, teacher, loss=rows, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, **options).sum(), student)[0]


def stored_mask(teacher):
    return torch.zeros(5, V, dtype=torch.bool).scatter(1, teacher.ids, value=True)


@each_tail
def test_reference_matches_definition(tail):
    """By hand: p = (1/2, 1/4) stored and 1/4 left, q = (1/8, 1/2) and 3/8 in two other ids."""
    student = torch.tensor([[1 / 8, 1 / 8, 1 / 2, 1 / 4]]).log()
    teacher = TopK(torch.tensor([[0, 2]]), torch.tensor([[1 / 2, 1 / 4]]).log())
    p, q = (1 / 2, 1 / 4, 1 / 4), (1 / 8, 1 / 2, 3 / 8)
    if tail == "renormalize":
        p, q = (2 / 3, 1 / 3), (1 / 5, 4 / 5)
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    expected = torch.tensor([0.3 * forward + 0.7 * reverse])
    for loss in (topk_kl_reference, rows):
        got = loss(student, teacher, forward=0.3, reverse=0.7, tail=tail)
        torch.testing.assert_close(got, expected)


def test_bucket_is_the_divergence_of_merged_distributions():
    s, t = draw(1)
    teacher = store(t)
    inside = stored_mask(teacher)

    def merged(logits):
        p = logits.softmax(-1)
        rest = p.masked_fill(inside, 0).sum(-1, keepdim=True)
        return torch.cat([p.gather(1, teacher.ids), rest], dim=1).log()

    def expected(p, q):
        return kl_div(q, p, reduction="none", log_target=True).sum(-1)

    p, q = merged(t), merged(s)
    torch.testing.assert_close(rows(s, teacher), expected(p, q))
    torch.testing.assert_close(rows(s, teacher, forward=0.0, reverse=1.0), expected(q, p))


@each_tail
@each_mix
def test_gradcheck(tail, mix):
    s, t = draw(1)
    s.requires_grad_()
    teacher, options = store(t), {"tail": tail, **weights(mix)}
    assert torch.autograd.gradcheck(lambda s: topk_kl_reference(s, teacher, **options), s)
    assert torch.autograd.gradcheck(lambda s: rows(s, teacher, **options), s)


@each_tail
@pytest.mark.parametrize("shape", [(1, 1), (7, 1423)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fused(backend, tail, shape, dtype):
    """Value and gradients with a soft-cap, a temperature, a bias and a cut vocabulary."""
    if backend != "torch" and dtype == torch.float64:
        pytest.skip("the Triton back-end computes in float32")
    N, V = shape
    x, w, y, v, target = make_inputs(N, V).to(dtype)
    bias = torch.randn(V, device=x.device).to(dtype).requires_grad_()
    limit = max(1, V - 9)
    transform = LogitTransform(scale=1.3, softcap=9.0, temperature=1.5, vocab_limit=limit)
    full = store((y.double() @ v.double().T)[:, :limit] / 1.5, min(limit, 64))
    teacher = TopK(full.ids, full.values.float() if dtype != torch.float64 else full.values)
    options = {"tail": tail, "forward": 0.6, "reverse": 0.4}
    loss = linear_topk_kl(
        x,
        w,
        teacher,
        target,
        student_bias=bias,
        student_transform=transform,
        backend=backend,
        reduction="sum",
        chunk_bytes=3 * 4 * V,
        **options,
    )
    got = [loss, *torch.autograd.grad(loss, (x, w, bias))]

    def eager(dtype):
        leaves = [a.detach().to(dtype).requires_grad_() for a in (x, w, bias)]
        student = transform(leaves[0] @ leaves[1].T + leaves[2])
        total = topk_kl_reference(student, teacher, **options)[target != -100].sum()
        return [total, *torch.autograd.grad(total, leaves)]

    torch_own = eager(torch.promote_types(dtype, torch.float32))
    for name, actual, expected64, own in zip(
        ("loss", "dX", "dW", "dbias"), got, eager(torch.float64), torch_own, strict=True
    ):
        expected64 = expected64.masked_fill(expected64.abs() < 1e-15, 0)
        assert_close(name, actual, expected64, own.to(actual.dtype))


def test_renormalize_projects_nothing(monkeypatch):
    from bidistill_kernels import _products

    def refuse(*args):
        raise AssertionError("projected")

    x, w, y, v, target = make_inputs(7, 1423).to(torch.float32)
    teacher = store(y @ v.T)
    monkeypatch.setattr(_products, "project", refuse)
    dw = torch.autograd.grad(linear_topk_kl(x, w, teacher, target, tail="renormalize"), w)[0]
    assert dw.any(-1).sum() <= 7 * K
    with pytest.raises(AssertionError, match="projected"):
        linear_topk_kl(x, w, teacher, target)


@each_tail
def test_compiles_without_a_graph_break(tail):
    x, w, y, v, target = make_inputs(6, 40).to(torch.float32)
    teacher = store(y @ v.T)

    def call(x, w, teacher):
        return linear_topk_kl(x, w, teacher, target, tail=tail, reverse=0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [
        (loss, *torch.autograd.grad(loss, (x, w)))
        for loss in (compiled(x, w, teacher), call(x, w, teacher))
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@each_tail
def test_stats(tail):
    s, t = draw(2)
    teacher = store(t)
    _, stats = topk_kl(s, teacher, reverse=0.5, tail=tail, return_stats=True)
    forward = topk_kl_reference(s, teacher, tail=tail)
    reverse = topk_kl_reference(s, teacher, forward=0.0, reverse=1.0, tail=tail)
    torch.testing.assert_close(stats.forward_kl, forward)
    torch.testing.assert_close(stats.reverse_kl, reverse)
    torch.testing.assert_close(stats.per_token, forward + 0.5 * reverse)
    if tail == "bucket":
        torch.testing.assert_close(stats.student_lse, s.logsumexp(-1))


def test_module():
    x, w, y, v, target = make_inputs(5, 20).to(torch.float32)
    teacher = store(y @ v.T, 4)
    module = LinearTopKKL(tail="renormalize")
    expected = linear_topk_kl(x, w, teacher, target, tail="renormalize")
    assert torch.equal(module(x, w, teacher, target), expected)


# --- the store ----------------------------------------------------------------------------


def test_topk_log_probs(backend):
    _, _, y, v, _ = make_inputs(7, 1423).to(torch.float32, grad=False)
    bias = torch.randn(1423, device=y.device)
    bias[5] = -inf
    transform = LogitTransform(temperature=2.0, vocab_limit=1400)
    options: Any = {"teacher_bias": bias, "transform": transform, "backend": backend}
    got = topk_log_probs(y, v, 20, chunk_bytes=3 * 4 * 1423, **options)
    expected = store(transform(y.double() @ v.double().T + bias), 20)
    assert torch.equal(got.ids, expected.ids)
    assert got.ids.dtype == torch.int64
    assert_close("values", got.values, expected.values, expected.values.float())
    assert not got.values.requires_grad


def test_online_composition():
    x, w, y, v, target = make_inputs(7, 40).to(torch.float64)
    loss = linear_topk_kl(x, w, topk_log_probs(y, v, k=40), target)
    full = bidirectional_kl_reference(x @ w.T, y @ v.T, forward=1.0, reverse=0.0)
    torch.testing.assert_close(loss, full[target != -100].mean())


def make_logits(logits):
    return TorchLogits(logits.clone(), None, LogitTransform())


def test_log_probabilities_of_any_logits():
    z = torch.randn(4, 50)
    for offset, error in ((0, 1e-6), (30, 5e-6), (1e4, 1e-3)):
        for k in (1, 6, 50, 90):
            got, expected = (
                top_log_probs(make_logits(z + offset), k),
                store((z + offset).double(), k),
            )
            assert torch.equal(got.ids, expected.ids)
            # one rounding of the log-sum-exp of the others, which moves all entries together
            torch.testing.assert_close(got.values.double(), expected.values, rtol=0, atol=error)
            # so that the tail stays 1 minus their sum, and nothing with all ids stored
            tail = 1 - got.values.double().exp().sum(-1)
            wanted = 1 - expected.values.exp().sum(-1)
            torch.testing.assert_close(tail, wanted, rtol=error, atol=5e-7)


def test_masked_ids_of_the_teacher_are_absent():
    s, t = draw(3)
    t[:, 4:] = -inf
    teacher = top_log_probs(make_logits(t), 7)
    assert teacher.values.isneginf().sum(-1).tolist() == [3] * 5
    expected = bidirectional_kl_reference(s[:, :4], t[:, :4], forward=1.0, reverse=0.0)
    torch.testing.assert_close(rows(s, teacher, tail="renormalize"), expected)


# --- invariants ---------------------------------------------------------------------------

properties = settings(derandomize=True, max_examples=15, deadline=None)
seeds, ks = st.integers(0, 2**31), st.integers(1, V - 1)
tails, mixes = st.sampled_from(TAILS), st.sampled_from(list(MIXES.values()))


@properties
@given(seeds, ks, tails, mixes)
def test_never_negative_and_zero_for_equal_models(seed, k, tail, mix):
    s, t = draw(seed)
    options = {"tail": tail, **weights(mix)}
    assert (rows(s, store(t, k), **options) >= 0).all()
    zeros = torch.zeros_like(s)
    torch.testing.assert_close(rows(s, store(s, k), **options), zeros[:, 0], rtol=0, atol=1e-12)
    # the tail of a store is known to 1e-6 only
    if (store(s, k).values.exp().sum(-1) < 1 - 1e-6).all() or tail == "renormalize":
        torch.testing.assert_close(gradient(s, store(s, k), **options), zeros)


@properties
@given(seeds, tails, mixes)
def test_the_whole_vocabulary_stored_is_full_kl(seed, tail, mix):
    s, t = draw(seed)
    full = bidirectional_kl_reference(s, t, **weights(mix))
    options = {"tail": tail, **weights(mix)}
    torch.testing.assert_close(rows(s, store(t, V), **options), full)
    torch.testing.assert_close(topk_kl_reference(s, store(t, V), **options), full)
    whole = gradient(s, t, bidirectional_kl_reference, **weights(mix))
    torch.testing.assert_close(gradient(s, store(t, V), **options), whole)


@properties
@given(seeds, ks, mixes)
def test_a_finer_store_sees_more(seed, k, mix):
    """Merging outcomes never adds divergence (data processing)."""
    s, t = draw(seed, spread=1.5)
    coarse, fine = (rows(s, store(t, k), **weights(mix)) for k in (k, k + 1))
    full = bidirectional_kl_reference(s, t, **weights(mix))
    assert (coarse <= fine + 1e-9).all()
    assert (fine <= full + 1e-9).all()


@properties
@given(seeds, ks)
def test_chain_rule_between_the_tails(seed, k):
    """Bucket = divergence of inside against outside + share inside * renormalised."""
    s, t = draw(seed, spread=1.5)
    teacher = store(t, k)
    p = teacher.values.exp().sum(-1)
    q = s.softmax(-1).gather(1, teacher.ids).sum(-1)
    sides = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    inside = p * rows(s, teacher, tail="renormalize")
    torch.testing.assert_close(rows(s, teacher), sides + inside)


@properties
@given(seeds, tails, mixes, st.floats(-50, 50))
def test_invariances(seed, tail, mix, constant):
    s, t = draw(seed)
    options, teacher = {"tail": tail, **weights(mix)}, store(t)
    expected = rows(s, teacher, **options)
    torch.testing.assert_close(rows(s + constant, teacher, **options), expected)
    g = torch.Generator().manual_seed(seed)
    order, entries = torch.randperm(V, generator=g), torch.randperm(K, generator=g)
    moved = TopK(order.argsort()[teacher.ids], teacher.values)
    torch.testing.assert_close(rows(s[:, order], moved, **options), expected)
    shuffled = TopK(teacher.ids[:, entries], teacher.values[:, entries])
    torch.testing.assert_close(rows(s, shuffled, **options), expected)
    if tail == "renormalize":  # then final logits do as well
        off = TopK(teacher.ids, teacher.values + constant)
        torch.testing.assert_close(rows(s, off, **options), expected)
    tempered = rows(s, teacher, student_transform=LogitTransform(temperature=2.0), **options)
    torch.testing.assert_close(tempered, rows(s / 2, teacher, **options))


@properties
@given(seeds, tails, mixes)
def test_gradient_support(seed, tail, mix):
    s, t = draw(seed)
    teacher, options = store(t), {"tail": tail, **weights(mix)}
    got, inside = gradient(s, teacher, **options), stored_mask(teacher)
    torch.testing.assert_close(got.sum(-1), torch.zeros(5, dtype=s.dtype))
    if tail == "renormalize":
        assert not got[~inside].any()
        return
    # in the tail a row scalar times p
    share = (got / s.softmax(-1)).masked_fill(inside, 0)
    scalar = share.sum(-1, keepdim=True) / (V - K)
    torch.testing.assert_close(share, scalar.expand_as(share).masked_fill(inside, 0))
    assert share.any(-1).all()


# --- edges --------------------------------------------------------------------------------


@each_tail
def test_absent_entries_do_not_disturb(tail):
    s, t = draw(4)
    full = store(t)
    values, ids = full.values.clone(), full.ids.clone()
    values[0, 2:], ids[0, 2:] = -inf, 0  # padding that repeats one id
    values[1, 3:], ids[1, 3:] = -inf, ids[1, 0].clone()  # the id of a real entry
    values[2, 1:5], ids[2, 1:5] = -inf, s[2].argmax()  # of an id outside, in the middle
    values[3, 5:], ids[3, 5:] = -inf, -1  # of no id
    values[4], ids[4] = -inf, 7  # nothing is stored
    teacher, options = TopK(ids, values), {"tail": tail, "forward": 0.6, "reverse": 0.4}
    loss, got = rows(s, teacher, **options), gradient(s, teacher, **options)
    torch.testing.assert_close(topk_kl_reference(s, teacher, **options), loss)
    for n, kept in enumerate(([0, 1], [0, 1, 2], [0, 5], [0, 1, 2, 3, 4])):
        row = slice(n, n + 1)
        alone = TopK(full.ids[row, kept], full.values[row, kept])
        torch.testing.assert_close(loss[row], rows(s[row], alone, **options))
        torch.testing.assert_close(got[row], gradient(s[row], alone, **options))
    assert loss[4] == 0
    assert not got[4].any()
    _, stats = topk_kl(s, teacher, return_stats=True)
    torch.testing.assert_close(stats.student_lse[:4], s.logsumexp(-1)[:4])


@each_tail
@each_mix
def test_one_stored_id(tail, mix):
    s, t = draw(5)
    options = {"tail": tail, **weights(mix)}
    loss = rows(s, store(t, 1), **options)
    torch.testing.assert_close(loss, topk_kl_reference(s, store(t, 1), **options))
    # renormalised on one id, all models agree
    assert loss.any() == gradient(s, store(t, 1), **options).any() == (tail == "bucket")


@each_tail
def test_one_id(tail):
    s = torch.randn(3, 1)
    assert not rows(s, store(torch.randn(3, 1)), tail=tail).any()
    assert not gradient(s, store(torch.randn(3, 1)), tail=tail).any()


@each_tail
def test_masked_by_the_student(tail):
    s, t = draw(6)
    teacher = store(t)
    s[0, teacher.ids[0, 1]] = -inf
    assert rows(s, teacher, tail=tail).isinf().tolist() == [True, *[False] * 4]
    # a weight of 0 switches a part off even where it is infinite
    loss = rows(s, teacher, forward=0.0, reverse=1.0, tail=tail)
    torch.testing.assert_close(
        loss, topk_kl_reference(s, teacher, forward=0.0, reverse=1.0, tail=tail)
    )
    assert loss.isfinite().all()
    for mix in ((1.0, 0.0), (0.0, 1.0)):
        got = gradient(s, teacher, tail=tail, **weights(mix))
        assert got.isfinite().all()


def test_no_bucket_where_both_models_mask_the_others():
    s, t = draw(7)
    s[:, K:] = t[:, K:] = -inf
    for mix in MIXES.values():
        full = bidirectional_kl_reference(s[:, :K], t[:, :K], **weights(mix))
        torch.testing.assert_close(rows(s, store(t), **weights(mix)), full)
        assert gradient(s, store(t), **weights(mix)).isfinite().all()
    # the student alone: the teacher's tail is impossible
    s, t = draw(7)
    s[:, K:] = -inf
    t[:, K:].clamp_(max=1)
    t[:, :K] = 2.0
    assert rows(s, store(t)).isinf().all()


def test_a_tail_of_the_student_is_not_one_minus_a_sum():
    """The student's share of 1e-9 outside the ids has all its digits."""
    s, t = torch.randn(4, 50), torch.randn(4, 50) * 0.1
    teacher = store(t.double(), 6)
    s.scatter_add_(1, teacher.ids, torch.full((4, 6), 25.0))
    for mix in MIXES.values():
        options = weights(mix)
        expected = topk_kl_reference(s.double(), teacher, **options)
        torch.testing.assert_close(
            rows(s, teacher, **options).double(), expected, rtol=3e-7, atol=0
        )
        wanted = gradient(s.double(), teacher, topk_kl_reference, **options)
        assert_close("gradient", gradient(s, teacher, **options), wanted, wanted.float())


@each_mix
def test_a_16_bit_gradient_is_rounded_once(mix):
    s, t = (logits.float() for logits in draw(13, spread=1.0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.full_like(s, torch.nan, dtype=dtype)
        chunk = Chunk(make_logits(s), store(t), None, buffer, need_gradient=True)
        ROW_LOSSES["topk_kl_bucket"].function(chunk, mix)
        results.append(buffer)
    assert torch.equal(results[0].bfloat16(), results[1])


@each_tail
def test_accurate_where_the_models_nearly_agree(tail):
    s = torch.randn(20, 400)
    t = s + torch.randn(20, 400) * 2e-3
    full = store(t.double(), 64)
    teacher = TopK(full.ids, full.values.float())
    expected = topk_kl_reference(s.double(), TopK(full.ids, teacher.values.double()), tail=tail)

    def error(actual):
        return ((actual.double() - expected) / expected.mean()).abs().max().item()

    assert expected.max() < 5e-6
    assert error(rows(s, teacher, tail=tail)) < 2e-3 < 1e-2
    assert error(topk_kl_reference(s, teacher, tail=tail)) > 1e-2


@each_tail
@each_mix
def test_logits_of_ten_thousand(tail, mix):
    s, t = draw(10)
    s[0, 3], s[1, 4], t[2, 5] = 1e4, -1e4, 1e4
    s, teacher = s.float(), TopK(store(t).ids, store(t).values.float())
    options = {"tail": tail, **weights(mix)}
    expected = topk_kl_reference(s.double(), teacher, **options)
    own = topk_kl_reference(s, teacher, **options)
    assert_close("loss", rows(s, teacher, **options), expected, own)
    wanted = gradient(s.double(), teacher, topk_kl_reference, **options)
    own = gradient(s, teacher, topk_kl_reference, **options)
    assert_close("gradient", gradient(s, teacher, **options), wanted, own)


def test_a_store_in_16_bits_is_no_disaster():
    """Probabilities that add up to more than 1 are divided by their sum."""
    s, t = draw(8, spread=6.0)
    full = store(t)
    teacher = TopK(full.ids, full.values.half() + 1e-3)
    assert (teacher.values.double().exp().sum(-1) > 1).any()
    for mix in MIXES.values():
        loss = rows(s, teacher, **weights(mix))
        assert (loss >= 0).all()
        assert loss.isfinite().all()
        total = gradient(s, teacher, **weights(mix)).sum(-1)
        torch.testing.assert_close(total, torch.zeros_like(total))


@each_tail
def test_an_input_nan_is_not_hidden(tail):
    s, t = draw(11)
    teacher = store(t)
    s[0, teacher.ids[0, 1]] = torch.nan
    teacher.values[1, 2] = torch.nan
    wanted = [True, True, False, False, False]
    assert rows(s, teacher, tail=tail).isnan().tolist() == wanted


ids, values = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)
REJECTED = {
    "tail": (TopK(ids, values), {"tail": "truncate"}, ValueError, "tail: got 'truncate'.*bucket"),
    "weights": (TopK(ids, values), {"forward": 0}, ValueError, "forward: .*all 0"),
    "negative": (TopK(ids, values), {"reverse": -1.0}, ValueError, "reverse: got -1"),
    "rows": (TopK(ids[:3], values[:3]), {}, ValueError, r"teacher.ids: got shape \(3, 2\)"),
    "no ids": (TopK(ids[:, :0], values[:, :0]), {}, ValueError, r"teacher.ids: got shape \(4, 0"),
    "shapes": (TopK(ids, values[:, :1]), {}, ValueError, "teacher.values: got shape"),
    "kind": (TopK(values, values), {}, TypeError, "teacher.ids: got torch.float32"),
}


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"), REJECTED.values(), ids=REJECTED
)
def test_rejects(teacher, options, error, message):
    with pytest.raises(error, match=message):
        linear_topk_kl(torch.randn(4, 3), torch.randn(9, 3), teacher, **options)
    with pytest.raises(error, match=message):
        topk_kl(torch.randn(4, 9), teacher, **options)


@pytest.mark.parametrize("bad", [-1, 9, 10, 11])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_an_id_that_does_not_exist_shows_in_its_row_alone(tail, bad, backend):
    """10 head rows, of which 9 take part."""
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    w = torch.randn(10, 4, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, bad], [8, 4]], device=DEVICE)
    teacher = TopK(ids, torch.tensor([[-0.5, -1.5]] * 3, device=DEVICE))
    options = {"student_transform": LogitTransform(vocab_limit=9), "backend": backend}
    rows = linear_topk_kl(x, w, teacher, tail=tail, reduction="none", **options)
    assert rows.isnan().tolist() == [False, True, False]
    dx, dw = torch.autograd.grad(rows.sum(), (x, w))
    assert dx.isnan().any(-1).tolist() == [False, True, False]
    assert dw.isnan().any()
    assert not dw[9].any()


def test_no_rows_with_a_trained_bias(backend):
    x, w = torch.randn(0, 4, device=DEVICE), torch.randn(10, 4, device=DEVICE, requires_grad=True)
    b = torch.zeros(10, device=DEVICE, requires_grad=True)
    empty = torch.empty(0, 3, device=DEVICE)
    loss = linear_topk_kl(
        x, w, TopK(empty.long(), empty), student_bias=b, tail="renormalize", backend=backend
    )
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert not gradient.any()

"""Every loss, fused with the LM head by the chunk driver, against full logits in float64.

Shapes (N, V): (1, 1); odd (7, 1423); aligned (64, 4096); a real vocabulary (3, 128256). Properties
of the driver itself: reductions, weights, chunks, what is not computed, transforms, edges.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import (
    LogitTransform,
    bidirectional_kl,
    bidirectional_kl_reference,
    lm_head,
)
from tests.kernels.cases import CASES, Inputs, eager, fused, gradients, make_inputs
from tests.support import assert_close

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# one of each kind: dense gradient, sparse gradient, no teacher
KINDS = {name: CASES[name] for name in ("kl_and_ce", "hinge", "cross_entropy")}
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
SHAPES = [(1, 1), (7, 1423), (64, 4096), (3, 128_256)]


def check(case, inputs, dtype, **options):
    """Value and gradients of the sum, against float64 of the same inputs and eager float32."""
    rounded = inputs.to(dtype)
    # 16-bit eager logits would be off by half the gradient: eager gets fp32 and rounds at the end
    own_dtype = torch.promote_types(dtype, torch.float32)
    results = []
    for x, run in (
        (rounded, lambda x: fused(case, x, reduction="none", **options)),
        (rounded.to(torch.float64), lambda x: eager(case, x)),
        (rounded.to(own_dtype), lambda x: eager(case, x)),
    ):
        rows = run(x)
        upstream = torch.linspace(0.5, 1.5, len(rows)).double()
        results.append((rows, *gradients(rows, x, upstream)))
    for name, actual, expected64, own in zip(("loss", "dX", "dW"), *results, strict=True):
        # what float64 rounds to when the answer is 0, with a vocabulary of one id
        expected64 = expected64.masked_fill(expected64.abs() < 1e-15, 0)
        assert_close(name, actual, expected64, own.to(actual.dtype))


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(case, shape):
    check(case, make_inputs(*shape), torch.float32)


@each_case
def test_matches_reference_near(case):
    check(case, make_inputs(7, 1423, near=True), torch.float32)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference_in_other_dtypes(case, dtype, monkeypatch):
    monkeypatch.setattr(lm_head, "SLAB_ROWS", 500)
    check(case, make_inputs(7, 1423), dtype, chunk_bytes=3 * 8 * 1423)


@each_kind
def test_strided_inputs(case):
    inputs = make_inputs(7, 1423)
    x, w, y, v, target = inputs
    strided = Inputs(x.T.contiguous().T, w.T.contiguous().T, y.repeat(1, 2)[:, :12], v, target)
    assert not strided.student_weight.is_contiguous()
    assert not strided.teacher_hidden.is_contiguous()
    expected = eager(case, inputs)
    torch.testing.assert_close(fused(case, strided, reduction="none"), expected)


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case, reduction):
    inputs = make_inputs(4, 11, D=3, E=2, seed=1).to(torch.float64)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    transform = LogitTransform(scale=1.3, softcap=6.0, temperature=0.8)

    def call(x, w, b):
        options = {"student_bias": b, "student_transform": transform, "reduction": reduction}
        return fused(case, Inputs(x, w, *inputs[2:]), chunk_bytes=2 * 2 * 11 * 8, **options)

    assert torch.autograd.gradcheck(call, (*inputs[:2], bias))


@each_case
def test_transforms_and_biases(case):
    x = make_inputs(7, 60).to(torch.float64)
    sides = {"student": LogitTransform(1.5, 9.0, 0.7, 50)}
    if case.has_teacher:
        sides["teacher"] = LogitTransform(0.5, None, 2.0, 50)
    biases = {f"{name}_bias": torch.randn(60, dtype=torch.float64) for name in sides}
    options = {f"{name}_transform": transform for name, transform in sides.items()} | biases
    x.target.clamp_(max=49)
    loss = fused(case, x, reduction="none", **options)

    x64 = x.to(torch.float64)
    # the definition, written out: scale, then soft-cap, then temperature, on the first 50 ids
    raw = (x64[0] @ x64[1].T + biases["student_bias"])[:, :50] * 1.5
    logits = [9 * torch.tanh(raw / 9) / 0.7]
    if case.has_teacher:
        logits.append((x64[2] @ x64[3].T + biases["teacher_bias"])[:, :50] * 0.5 / 2)
    rows = case.reference(*logits, x.target.clamp(min=0), **case.options)
    expected = rows.masked_fill(x.target == -100, 0)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn(7)
    pairs = zip(gradients(loss, x, upstream), gradients(expected, x64, upstream), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


@each_kind
def test_reductions(case):
    inputs = make_inputs(9, 83).to(torch.float64)
    weight = torch.rand(9, dtype=torch.float64)
    rows = eager(case, inputs)
    counted = (inputs.target != -100).double()
    expected = {
        "none": ({"reduction": "none"}, rows),
        "sum": ({"reduction": "sum"}, rows.sum()),
        "mean": ({}, rows.sum() / counted.sum()),
        "num_items": ({"num_items": 40}, rows.sum() / 40),
        "tensor": ({"num_items": torch.tensor(40)}, rows.sum() / 40),
        "weighted none": ({"reduction": "none", "token_weight": weight}, rows * weight),
        "weighted": ({"token_weight": weight}, (rows * weight).sum() / (weight * counted).sum()),
    }
    for name, (options, value) in expected.items():
        actual = fused(case, inputs, **options)
        torch.testing.assert_close(actual, value, msg=name)
        upstream = torch.randn(value.shape)
        pairs = zip(
            gradients(actual, inputs, upstream), gradients(value, inputs, upstream), strict=True
        )
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, msg=name)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(rows=st.integers(1, 20), bytes_=st.integers(1, 40_000), name=st.sampled_from(sorted(CASES)))
def test_chunks_do_not_matter(rows, bytes_, name):
    inputs = make_inputs(rows, 37, seed=rows).to(torch.float64)
    whole, parts = fused(CASES[name], inputs), fused(CASES[name], inputs, chunk_bytes=bytes_)
    torch.testing.assert_close(parts, whole)
    one = torch.ones(())
    for got, wanted in zip(
        gradients(parts, inputs, one), gradients(whole, inputs, one), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_chunks_are_even_and_within_the_bound(monkeypatch):
    projected = []

    def spy(self, rows, out):
        projected.append(len(rows))
        return project(self, rows, out)

    project = lm_head.Head.project
    monkeypatch.setattr(lm_head.Head, "project", spy)
    inputs = make_inputs(11, 30).to(torch.float32)
    inputs.target[:] = 0
    fused(CASES["jsd"], inputs, chunk_bytes=5 * 2 * 30 * 4)  # five rows of both models
    assert projected == [4, 4, 4, 4, 3, 3]


@each_kind
def test_stats(case):
    inputs = make_inputs(9, 83).to(torch.float64)
    loss, stats = fused(case, inputs, return_stats=True, token_weight=torch.full((9,), 0.5))
    assert loss.requires_grad
    assert not stats.per_token.requires_grad
    torch.testing.assert_close(stats.per_token, eager(case, inputs).detach())
    counted = inputs.target != -100
    for name, hidden, weight in (("student", *inputs[:2]), ("teacher", *inputs[2:4])):
        lse = getattr(stats, f"{name}_lse")
        if lse is not None:
            torch.testing.assert_close(lse, (hidden @ weight.T).logsumexp(-1).detach() * counted)


def test_stats_hold_both_divergences():
    inputs = make_inputs(9, 83).to(torch.float64)
    for reduction in ("sum", "none"):
        options = {"return_stats": True, "reduction": reduction}
        _, stats = fused(CASES["forward_kl"], inputs, **options)
        for name in ("forward_kl", "reverse_kl"):
            expected = eager(CASES[name], inputs).detach()
            torch.testing.assert_close(getattr(stats, name), expected)


@each_kind
def test_computes_only_what_is_needed(case, monkeypatch):
    asked = []

    def spy(self, head, needs, dtype):
        asked.append(tuple(needs))
        return init(self, head, needs, dtype)

    init = lm_head.Gradients.__init__
    monkeypatch.setattr(lm_head.Gradients, "__init__", spy)
    x, w, *rest = make_inputs(5, 30).to(torch.float32)
    frozen = w.detach()
    fused(case, Inputs(x, frozen, *rest)).backward()
    assert frozen.grad is None
    fused(case, Inputs(x.detach(), w, *rest)).backward()
    with torch.no_grad():
        fused(case, Inputs(x, w, *rest))
    fused(case, Inputs(x, w, *rest), reduction="none")
    nothing = (False, False, False)
    assert asked == [(True, False, False), (False, True, False), nothing, nothing]


@each_kind
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_and_weightless_rows_cost_nothing(case, reduction, monkeypatch):
    projected = []

    def spy(self, rows, out):
        projected.append(len(rows))
        return project(self, rows, out)

    project = lm_head.Head.project
    monkeypatch.setattr(lm_head.Head, "project", spy)
    inputs = make_inputs(10, 30).to(torch.float32)
    inputs.target[:] = 3
    inputs.target[2:6] = -100
    with torch.no_grad():  # a row that counts for nothing may hold anything
        inputs.student_hidden[2:6] = torch.nan
        inputs.student_hidden[8] = torch.nan
    weight = torch.ones(10)
    weight[8] = 0
    loss = fused(case, inputs, token_weight=weight, reduction=reduction).sum()
    dx, dw = gradients(loss, inputs, torch.ones(()))
    assert set(projected) == {5}
    assert loss.isfinite()
    zero = (dx == 0).all(-1)
    assert zero.tolist() == [row in (2, 3, 4, 5, 8) for row in range(10)]
    assert dw.isfinite().all()


@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_counts(case, reduction, rows):
    inputs = make_inputs(3, 30).to(torch.float32)
    inputs = Inputs(*[x[:rows] if i in (0, 2, 4) else x for i, x in enumerate(inputs)])
    x, w = (t.detach().requires_grad_() for t in inputs[:2])
    target = torch.full((rows,), -100)
    loss, stats = fused(
        case, Inputs(x, w, *inputs[2:4], target), reduction=reduction, return_stats=True
    )
    assert not loss.any()
    assert not stats.per_token.any()
    # connected zeros: without them a gradient reduction over ranks would wait for ever
    for leaf, gradient in zip((x, w), torch.autograd.grad(loss.sum(), (x, w)), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@each_kind
def test_autocast_does_not_lower_the_precision(case):
    inputs = make_inputs(7, 200).to(torch.float32)
    expected = fused(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(case, inputs), expected)


@each_case
def test_deterministic(case):
    runs = []
    for _ in range(2):
        inputs = make_inputs(33, 700).to(torch.float32)
        loss = fused(case, inputs, chunk_bytes=8 * 700 * 10)
        runs.append((loss, *gradients(loss, inputs, torch.ones(()))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(case, reduction):
    inputs = make_inputs(7, 50).to(torch.float32)
    loss = fused(case, inputs, reduction=reduction).sum()
    first = gradients(loss, inputs, torch.ones(()))
    twice = gradients(loss, inputs, torch.full((), 2.0))
    for a, b in zip(first, twice, strict=True):
        assert a.any()
        torch.testing.assert_close(b, 2 * a)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, inputs[:2], create_graph=True)


def test_small_gradients_survive_a_gradient_scaler():
    inputs = make_inputs(40, 50).to(torch.float16)
    # divided by a million the gradient is below fp16's smallest number until it is scaled back
    loss = fused(CASES["forward_kl"], inputs, num_items=1e6)
    small = gradients(loss, inputs, torch.tensor(1e6))
    whole = gradients(fused(CASES["forward_kl"], inputs, num_items=1.0), inputs, torch.ones(()))
    torch.testing.assert_close(small, whole)


def test_offsets_beyond_2_to_the_31():
    """Row 33,000 of 33,001 x 65,536 logits starts beyond 2^31; stride 0 keeps them cheap."""
    logits = torch.randn(1, 65_536).expand(33_001, -1)
    weight = torch.zeros(33_001)
    weight[-1] = 1
    teacher = torch.randn(1, 65_536)
    loss = bidirectional_kl(logits, teacher.expand(33_001, -1), token_weight=weight)
    expected = bidirectional_kl_reference(logits[:1].double(), teacher.double())
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)

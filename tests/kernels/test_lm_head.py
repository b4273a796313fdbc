"""Every loss, fused with the LM head by the chunk driver, against full logits in float64.

Shapes (N, V): (1, 1); odd (7, 1423); aligned (64, 4096); a real vocabulary (3, 128256). Properties
of the driver itself: reductions, weights, chunks, what is not computed, transforms, edges.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import (
    LogitTransform,
    _backends,
    _head,
    _products,
    bidirectional_kl,
    bidirectional_kl_reference,
    lm_head,
)
from tests.kernels.cases import (
    CASES,
    DEVICE,
    Inputs,
    eager,
    fused,
    gradients,
    make_inputs,
    reference_rows,
)
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
        upstream = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64, device=rows.device)
        results.append((rows, *gradients(rows, x, upstream)))
    for name, actual, expected64, own in zip(("loss", "dX", "dW"), *results, strict=True):
        # what float64 rounds to when the answer is 0, with a vocabulary of one id
        expected64 = expected64.masked_fill(expected64.abs() < 1e-15, 0)
        assert_close(name, actual, expected64, own.to(actual.dtype))


@each_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(case, shape, backend):
    if backend == "triton" and DEVICE.type == "cpu":
        shape = min(shape[0], 5), min(shape[1], 10_000)  # interpreted; test_dense.py has larger
    check(case, make_inputs(*shape), torch.float32, backend=backend)


@each_case
def test_matches_reference_near(case, backend):
    check(case, make_inputs(7, 1423, near=True), torch.float32, backend=backend)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_matches_reference_in_other_dtypes(case, dtype, backend, monkeypatch):
    monkeypatch.setattr(_products, "SLAB_ROWS", 500)
    if backend != "torch" and dtype == torch.float64:
        with pytest.raises(ValueError, match="computes in float32"):
            fused(case, make_inputs(7, 1423), backend=backend)
        return
    check(case, make_inputs(7, 1423), dtype, chunk_bytes=3 * 8 * 1423, backend=backend)


# rows of a slab, reduction: what happens to the gradient of the logits
SLABS = {
    "kept": (1000, "mean"),
    "kept, none": (1000, "none"),
    "summed slab by slab": (10, "sum"),
    "recomputed": (10, "none"),
    "summed chunk by chunk": (0, "mean"),
}
SLAB_CASES = [
    *(("kl_and_ce", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ("jsd", torch.bfloat16),
    ("bounded", torch.float32),
    ("bounded", torch.bfloat16),
    ("cross_entropy", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), SLAB_CASES, ids=str)
@pytest.mark.parametrize(("slab_rows", "reduction"), SLABS.values(), ids=SLABS)
def test_every_way_of_the_logit_gradient(name, dtype, slab_rows, reduction, backend, monkeypatch):
    """300 ids of which 290 take part, chunks of 5 rows, ignored rows, head and bias."""
    sizes = _backends.sizes

    def small(*args):
        slab_bytes = slab_rows * 304 * dtype.itemsize if sizes(*args).slab_bytes else 0
        return sizes(*args)._replace(chunk_bytes=2 * 304 * 4 * 5, slab_bytes=slab_bytes)

    monkeypatch.setattr(_backends, "sizes", small)
    case = CASES[name]
    # so narrow that a slab of 10 rows and the sum of dW take less memory than a slab of all
    inputs = make_inputs(16, 300, D=2, E=2, seed=3)
    inputs.target.clamp_(max=289)
    transform = LogitTransform(vocab_limit=290, scale=0.5, softcap=20.0)
    limits = {"student_transform": transform}
    if case.has_teacher:
        limits["teacher_transform"] = transform
    bias64 = torch.randn(300, dtype=torch.float64, device=DEVICE).to(dtype).double()
    weight = torch.linspace(0.2, 1.2, 16, device=DEVICE)
    rounded = inputs.to(dtype)
    bias = bias64.to(dtype).requires_grad_()
    options = {"student_bias": bias, "token_weight": weight, "reduction": reduction, **limits}
    loss = fused(case, rounded, backend=backend, **options)
    upstream = torch.full_like(loss, 1.7)
    actual = torch.autograd.grad(loss, (*rounded[:2], bias), upstream)

    results = []
    for kind in (torch.float64, torch.float32):
        exact = rounded.to(kind)
        b = bias64.to(kind).requires_grad_()
        student = transform(exact.student_hidden @ exact.student_weight.T + b)
        teacher = transform(exact.teacher_hidden @ exact.teacher_weight.T)
        per_row = reference_rows(case, student, teacher, exact.target) * weight.to(kind)
        counted = (weight * (exact.target != -100)).sum()
        expected = per_row if reduction == "none" else per_row.sum()
        expected = expected / counted if reduction == "mean" else expected
        results.append(
            (expected, *torch.autograd.grad(expected, (*exact[:2], b), upstream.to(kind)))
        )
    names = ("loss", "dX", "dW", "dbias")
    for what, got, wanted, own in zip(names, (loss, *actual), *results, strict=True):
        assert_close(what, got, wanted, own.to(got.dtype))


# rows of each product of the head's gradient, of 14 that count
WEIGHT_PRODUCTS = {
    "kept": [14],
    "kept, none": [14],
    "summed slab by slab": [9, 5],
    "recomputed": [9, 5],
    "summed chunk by chunk": [4, 5, 5],
}


@pytest.mark.parametrize("way", SLABS)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # slabs are its alone
def test_the_head_meets_as_many_rows_as_a_slab_has(way, backend, monkeypatch):
    products, add = [], _products.add_weight_gradient

    def spy(gradient, *args, **options):
        products.append(len(gradient))
        return add(gradient, *args, **options)

    monkeypatch.setattr(_products, "add_weight_gradient", spy)
    (slab_rows, reduction), sizes = SLABS[way], _backends.sizes
    few = {"chunk_bytes": 2 * 304 * 4 * 5, "slab_bytes": slab_rows * 304 * 4}
    monkeypatch.setattr(_backends, "sizes", lambda *args: sizes(*args)._replace(**few))
    inputs = make_inputs(16, 300, D=2, E=2, seed=3).to(torch.float32)
    assert (inputs.target != -100).sum() == 14
    fused(CASES["jsd"], inputs, backend=backend, reduction=reduction).sum().backward()
    assert products == WEIGHT_PRODUCTS[way]


@each_kind
def test_strided_inputs(case, backend):
    inputs = make_inputs(7, 1423).to(torch.float32)
    x, w, y, v, target = inputs
    strided = Inputs(x.T.contiguous().T, w.T.contiguous().T, y.repeat(1, 2)[:, :12], v, target)
    assert not strided.student_weight.is_contiguous()
    assert not strided.teacher_hidden.is_contiguous()
    expected = fused(case, inputs, reduction="none", backend=backend)
    torch.testing.assert_close(fused(case, strided, reduction="none", backend=backend), expected)


@each_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case, reduction):
    inputs = make_inputs(4, 11, D=3, E=2, seed=1).to(torch.float64)
    bias = torch.randn(11, dtype=torch.float64, device=DEVICE, requires_grad=True)
    transform = LogitTransform(scale=1.3, softcap=6.0, temperature=0.8)

    def call(x, w, b):
        options = {"student_bias": b, "student_transform": transform, "reduction": reduction}
        tensors = Inputs(x, w, *inputs[2:])
        return fused(case, tensors, chunk_bytes=2 * 2 * 11 * 8, backend="torch", **options)

    # two runs on an accelerator may add in another order
    assert torch.autograd.gradcheck(call, (*inputs[:2], bias), nondet_tol=1e-12)


@each_case
def test_one_product_for_a_shared_head(case, backend, monkeypatch):
    """Student and teacher may be one head, as in distillation of a model against itself."""
    if not case.has_teacher:
        pytest.skip("one model has one head")
    products = []

    def spy(hidden, weight, out):
        products.append(len(hidden))
        return project(hidden, weight, out)

    project = _products.project
    monkeypatch.setattr(_products, "project", spy)
    inputs = make_inputs(9, 83, E=16).to(torch.float32)
    x, w, y, _, target = inputs
    shared = Inputs(x, w, y, w.detach(), target)
    copied = Inputs(x, w, y, w.detach().clone(), target)
    one = fused(case, shared, backend=backend)
    counted = int((target != -100).sum())
    assert products == [2 * counted]
    two = fused(case, copied, backend=backend)
    assert products[1:] == [counted, counted]
    torch.testing.assert_close(one, two)
    upstream = torch.ones((), device=DEVICE)
    for a, b in zip(
        gradients(one, inputs, upstream), gradients(two, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@each_case
def test_transforms_and_biases(case):
    x = make_inputs(7, 60).to(torch.float64)
    sides = {"student": LogitTransform(1.5, 9.0, 0.7, 50)}
    if case.has_teacher:
        sides["teacher"] = LogitTransform(0.5, None, 2.0, 50)
    new = {"dtype": torch.float64, "device": DEVICE}
    biases = {f"{name}_bias": torch.randn(60, **new) for name in sides}
    options = {f"{name}_transform": transform for name, transform in sides.items()} | biases
    x.target.clamp_(max=49)
    loss = fused(case, x, reduction="none", backend="torch", **options)

    x64 = x.to(torch.float64)
    # the definition, written out: scale, then soft-cap, then temperature, on the first 50 ids
    raw = (x64[0] @ x64[1].T + biases["student_bias"])[:, :50] * 1.5
    logits = [9 * torch.tanh(raw / 9) / 0.7]
    if case.has_teacher:
        logits.append((x64[2] @ x64[3].T + biases["teacher_bias"])[:, :50] * 0.5 / 2)
    rows = case.reference(*logits, x.target.clamp(min=0), **case.options)
    expected = rows.masked_fill(x.target == -100, 0)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn(7, device=DEVICE)
    pairs = zip(gradients(loss, x, upstream), gradients(expected, x64, upstream), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


@each_kind
def test_reductions(case):
    inputs = make_inputs(9, 83).to(torch.float64)
    weight = torch.rand(9, dtype=torch.float64, device=DEVICE)
    rows = eager(case, inputs)
    counted = (inputs.target != -100).double()
    expected = {
        "none": ({"reduction": "none"}, rows),
        "sum": ({"reduction": "sum"}, rows.sum()),
        "mean": ({}, rows.sum() / counted.sum()),
        "num_items": ({"num_items": 40}, rows.sum() / 40),
        "tensor": ({"num_items": torch.tensor(40, device=DEVICE)}, rows.sum() / 40),
        "weighted none": ({"reduction": "none", "token_weight": weight}, rows * weight),
        "weighted": ({"token_weight": weight}, (rows * weight).sum() / (weight * counted).sum()),
    }
    for name, (options, value) in expected.items():
        actual = fused(case, inputs, **options)
        torch.testing.assert_close(actual, value, msg=name)
        upstream = torch.randn(value.shape, device=DEVICE)
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
    one = torch.ones((), device=DEVICE)
    for got, wanted in zip(
        gradients(parts, inputs, one), gradients(whole, inputs, one), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_chunks_are_even_and_within_the_bound(monkeypatch):
    projected = []

    def spy(self, rows, out):
        projected.append(len(out))
        return project(self, rows, out)

    project = _head.Head.project
    monkeypatch.setattr(_head.Head, "project", spy)
    inputs = make_inputs(11, 30).to(torch.float32)
    inputs.target[:] = 0
    fused(CASES["jsd"], inputs, chunk_bytes=5 * 2 * 30 * 4)  # five rows of both models
    assert projected == [3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("M", "most"),
    [(1024, 234), (8192, 89), (700, 234), (129, 16), (9, 5), (33, 16), (0, 8), (3, 8)],
)
def test_chunks_are_eights_of_rows(M, most):
    C = lm_head._chunk_rows(M, most)
    bounds = lm_head._bounds(M, C)
    rows = [stop - start for start, stop in pairwise(bounds)]
    assert bounds[0] == 0
    assert sum(rows) == M
    assert all(0 < count <= most for count in rows)
    if most >= 8 and rows:
        assert all(count % 8 == 0 for count in rows[:-1])
        assert max(rows) - min(rows) < 16


@each_kind
def test_stats(case):
    inputs = make_inputs(9, 83).to(torch.float64)
    loss, stats = fused(
        case,
        inputs,
        return_stats=True,
        backend="torch",
        token_weight=torch.full((9,), 0.5, device=DEVICE),
    )
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

    def spy(*args):
        asked.append(tuple(args[6]))
        return run(*args)

    run = lm_head.run_chunks
    monkeypatch.setattr(lm_head, "run_chunks", spy)
    x, w, *rest = make_inputs(5, 30).to(torch.float32)
    frozen = w.detach()
    fused(case, Inputs(x, frozen, *rest)).backward()
    assert frozen.grad is None
    fused(case, Inputs(x.detach(), w, *rest)).backward()
    with torch.no_grad():
        fused(case, Inputs(x, w, *rest))
    fused(case, Inputs(x, w, *rest), reduction="none")
    expected = [(True, False, False), (False, True, False), (False, False, False)]
    assert asked == [*expected, (True, True, False)]


@each_kind
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_and_weightless_rows_cost_nothing(case, reduction, monkeypatch):
    projected = []

    def spy(self, rows, out):
        projected.append(len(out))
        return project(self, rows, out)

    project = _head.Head.project
    monkeypatch.setattr(_head.Head, "project", spy)
    inputs = make_inputs(10, 30).to(torch.float32)
    inputs.target[:] = 3
    inputs.target[2:6] = -100
    with torch.no_grad():  # a row that counts for nothing may hold anything
        inputs.student_hidden[2:6] = torch.nan
        inputs.student_hidden[8] = torch.nan
    weight = torch.ones(10, device=DEVICE)
    weight[8] = 0
    loss = fused(case, inputs, token_weight=weight, reduction=reduction).sum()
    dx, dw = gradients(loss, inputs, torch.ones((), device=DEVICE))
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
    target = torch.full((rows,), -100, device=DEVICE)
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
def test_nothing_counts_in_16_bits(case, backend):
    inputs = make_inputs(3, 30).to(torch.float16)
    inputs.target[:] = -100
    loss = fused(case, inputs, backend=backend)
    assert not loss
    for gradient in gradients(loss, inputs, torch.ones((), device=DEVICE)):
        assert not gradient.any()


def test_a_teacher_that_uses_some_columns_of_the_head(backend):
    x, w, y, _, target = make_inputs(5, 30, E=16).to(torch.float32)
    part = w.detach()[:, :12]
    one = fused(CASES["jsd"], Inputs(x, w, y[:, :12], part, target), backend=backend)
    two = fused(CASES["jsd"], Inputs(x, w, y[:, :12], part.clone(), target), backend=backend)
    torch.testing.assert_close(one, two)


def test_a_bias_alone_keeps_no_slab(backend):
    x, w, y, v, target = make_inputs(6, 30).to(torch.float32)
    b = torch.zeros(30, device=DEVICE, requires_grad=True)
    for reduction in ("mean", "none"):
        options = {"student_bias": b, "reduction": reduction, "backend": backend}
        loss = fused(CASES["jsd"], Inputs(x, w.detach(), y, v, target), **options)
        saved = [t for t in _saved(loss) if t is not None]
        assert max(t.numel() for t in saved) <= max(t.numel() for t in (x, w, y, v))
        assert torch.autograd.grad(loss.sum(), b)[0].any()


def _saved(loss):
    """Tensors that the operation under a loss saved."""
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors") or "bidistill" not in type(node).__name__:
        node = next(n for n, _ in node.next_functions if n is not None)
    return node.saved_tensors


@each_kind
def test_autocast_does_not_lower_the_precision_on_cpu(case):
    if DEVICE.type != "cpu":
        pytest.skip("an accelerator multiplies in 16 bits under autocast")
    inputs = make_inputs(7, 200).to(torch.float32)
    expected = fused(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fused(case, inputs), expected)


@each_case
def test_deterministic(case, backend):
    if backend == "torch" and DEVICE.type == "cuda":
        pytest.skip("torch's own index_add is not deterministic on CUDA")
    runs = []
    for _ in range(2):
        inputs = make_inputs(33, 700).to(torch.float32)
        loss = fused(case, inputs, chunk_bytes=8 * 704 * 10, backend=backend)
        runs.append((loss, *gradients(loss, inputs, torch.ones((), device=DEVICE))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(case, reduction, backend):
    inputs = make_inputs(7, 50).to(torch.float32)
    loss = fused(case, inputs, reduction=reduction, backend=backend).sum()
    first = gradients(loss, inputs, torch.ones((), device=DEVICE))
    twice = gradients(loss, inputs, torch.full((), 2.0, device=DEVICE))
    for a, b in zip(first, twice, strict=True):
        assert a.any()
        torch.testing.assert_close(b, 2 * a)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, inputs[:2], create_graph=True)


def test_small_gradients_survive_a_gradient_scaler(backend):
    inputs = make_inputs(40, 50).to(torch.float16)
    # divided by a million the gradient is below fp16's smallest number until it is scaled back
    loss = fused(CASES["forward_kl"], inputs, num_items=1e6, backend=backend)
    small = gradients(loss, inputs, torch.tensor(1e6, device=DEVICE))
    loss = fused(CASES["forward_kl"], inputs, num_items=1.0, backend=backend)
    whole = gradients(loss, inputs, torch.ones((), device=DEVICE))
    torch.testing.assert_close(small, whole)


def test_offsets_beyond_2_to_the_31():
    """Row 33,000 of 33,001 x 65,536 logits starts beyond 2^31; stride 0 keeps them cheap."""
    logits = torch.randn(1, 65_536, device=DEVICE).expand(33_001, -1)
    weight = torch.zeros(33_001, device=DEVICE)
    weight[-1] = 1
    teacher = torch.randn(1, 65_536, device=DEVICE)
    loss = bidirectional_kl(logits, teacher.expand(33_001, -1), token_weight=weight)
    expected = bidirectional_kl_reference(logits[:1].double(), teacher.double())
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)


@each_kind
def test_no_host_sync(case, backend):
    """With no row to look for, nothing waits for the device."""
    if DEVICE.type != "cuda" or backend != "triton":
        pytest.skip("only an accelerator is waited for")
    inputs = make_inputs(40, 500).to(torch.bfloat16)
    inputs.target.clamp_(min=0)
    upstream = torch.ones((), device=DEVICE)

    def step():
        loss = fused(case, inputs, ignore_index=None, backend=backend)
        return gradients(loss, inputs, upstream)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_kind
def test_all_rows_count_without_a_look(case):
    inputs = make_inputs(9, 83).to(torch.float64)
    inputs.target.clamp_(min=0)
    one = fused(case, inputs)
    assert torch.equal(one, fused(case, inputs, ignore_index=None))

"""Liger's losses by our kernels: signatures, values and gradients against the real package (by
Triton's interpreter where there is no GPU) and against full logits in float64."""

import importlib
import inspect

import pytest
import torch

from bidistill.errors import UserError
from bidistill.integrations import liger
from bidistill_kernels import bidirectional_kl_reference, jsd_reference, kl_to_probs_reference
from tests.kernels.cases import DEVICE, make_inputs
from tests.support import assert_close

NAMES = ["LigerFusedLinearJSD", "LigerFusedLinearKLDivLoss"]
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
REDUCTIONS = pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
LABELS = pytest.mark.parametrize("labelled", [True, False], ids=["labels", "all rows"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# lanes beyond a row's end hold -inf: NumPy, which interprets Liger's kernels, warns of them
INTERPRETED = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
PRECISIONS = torch.float64, torch.float32
T = 1.7


@pytest.fixture
def theirs():
    """Liger's own module of the losses."""
    pytest.importorskip("triton", reason="Liger's kernels need Triton")
    return pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")


def case(dtype, labelled):
    inputs = make_inputs(9, 150)
    probs = (inputs.teacher_hidden @ inputs.teacher_weight.T).softmax(-1).to(dtype)
    return inputs.to(dtype), probs, inputs.target if labelled else None


def mean_rows(rows, labels, reduction="batchmean"):
    """Liger's reductions, written out."""
    counts = rows.new_ones(len(rows), dtype=torch.bool) if labels is None else labels != -100
    total = rows[counts].sum()
    divisor = {"batchmean": counts.sum(), "mean": counts.sum() * 150, "sum": 1}[reduction]
    return total / divisor


def jsd_from_logits(inputs, labels, beta, dtype):
    """Loss and gradients from full logits."""
    x, w, y, v, _ = inputs.to(dtype)
    s, t = x @ w.T / T, y @ v.T / T
    if beta in (0, 1):
        rows = bidirectional_kl_reference(s, t, forward=1 - beta, reverse=beta)
    else:
        rows = jsd_reference(s, t, beta=beta)
    return with_gradients(mean_rows(rows, labels), x, w)


def kl_from_logits(inputs, probs, labels, reduction, dtype):
    x, w, *_ = inputs.to(dtype)
    rows = kl_to_probs_reference(x @ w.T / T, probs.to(dtype))
    return with_gradients(mean_rows(rows, labels, reduction), x, w)


def with_gradients(loss, x, w):
    """Under an upstream gradient that is not 1."""
    return loss.detach(), *torch.autograd.grad(loss * 3, (x, w))


def compare(got, expected64, own):
    for name, actual, wanted, plain in zip(("loss", "dX", "dW"), got, expected64, own, strict=True):
        assert_close(name, actual, wanted, plain.to(actual.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_liger(theirs, name):
    """Names, order, kinds and defaults; annotations may differ."""
    for method in ("__init__", "forward"):
        functions = [getattr(getattr(module, name), method) for module in (liger, theirs)]
        ours, real = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in functions
        )
        assert ours == real


@LABELS
@BETAS
@DTYPES
def test_jsd_equals_full_logits(dtype, beta, labelled):
    inputs, _, labels = case(dtype, labelled)
    loss = liger.LigerFusedLinearJSD(beta, temperature=T)(*inputs[:4], labels)
    assert loss.dtype == torch.float32
    got = with_gradients(loss, *inputs[:2])
    compare(
        got, *(jsd_from_logits(inputs, labels, beta, d) for d in (torch.float64, torch.float32))
    )


@LABELS
@REDUCTIONS
@DTYPES
def test_kl_equals_full_logits(dtype, reduction, labelled):
    inputs, probs, labels = case(dtype, labelled)
    loss = liger.LigerFusedLinearKLDivLoss(reduction, temperature=T)(*inputs[:2], probs, labels)
    assert loss.dtype == torch.float32
    got = with_gradients(loss, *inputs[:2])
    compare(got, *(kl_from_logits(inputs, probs, labels, reduction, d) for d in PRECISIONS))


@INTERPRETED
@LABELS
@BETAS
def test_jsd_of_liger_is_the_same(theirs, beta, labelled):
    """The real one passes where ours does, with the same bound."""
    inputs, _, labels = case(torch.float32, labelled)
    loss = theirs.LigerFusedLinearJSD(beta, temperature=T)(*inputs[:4], labels)
    got = with_gradients(loss, *inputs[:2])
    compare(
        got, *(jsd_from_logits(inputs, labels, beta, d) for d in (torch.float64, torch.float32))
    )


@INTERPRETED
@LABELS
@REDUCTIONS
def test_kl_of_liger_is_the_same(theirs, reduction, labelled):
    inputs, probs, labels = case(torch.float32, labelled)
    loss = theirs.LigerFusedLinearKLDivLoss(reduction, temperature=T)(*inputs[:2], probs, labels)
    got = with_gradients(loss, *inputs[:2])
    compare(got, *(kl_from_logits(inputs, probs, labels, reduction, d) for d in PRECISIONS))


@INTERPRETED
def test_probabilities_that_do_not_add_up_to_one(theirs):
    """Neither renormalises: Liger's gradient is softmax * sum(q) - q, and so is ours."""
    inputs, probs, labels = case(torch.float32, True)
    probs = probs * 0.5
    losses = [
        module.LigerFusedLinearKLDivLoss(eps=1e-3)(*inputs[:2], probs, labels)
        for module in (liger, theirs)
    ]
    ours, real = (with_gradients(loss, *inputs[:2]) for loss in losses)
    torch.testing.assert_close(ours, real)


def test_frozen_head_and_trainable_teacher():
    """As with Liger: no gradient for a frozen head, none for the teacher."""
    inputs, probs, labels = case(torch.float32, True)
    x, w, y, v = inputs[:4]
    w = w.detach()
    y, v, q = (t.clone().requires_grad_() for t in (y, v, probs))
    (liger.LigerFusedLinearJSD()(x, w, y, v, labels)).backward()
    assert x.grad is not None
    (liger.LigerFusedLinearKLDivLoss()(x, w, q, labels)).backward()
    assert [t.grad for t in (w, y, v, q)] == [None] * 4


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counts(name):
    inputs, probs, _ = case(torch.float32, True)
    labels = torch.full((9,), -7, device=DEVICE)
    teacher = inputs[2:4] if name == NAMES[0] else [probs]
    loss = getattr(liger, name)(ignore_index=-7)(*inputs[:2], *teacher, labels)
    assert not any(t.any() for t in with_gradients(loss, *inputs[:2]))


def test_the_sum_of_the_head_is_wide_whatever_accum_dtype_says():
    inputs, _, labels = case(torch.bfloat16, True)
    losses = [
        liger.LigerFusedLinearJSD(accum_dtype=d)(*inputs[:4], labels)
        for d in (None, torch.bfloat16, torch.float32)
    ]
    first, *others = (with_gradients(loss, *inputs[:2]) for loss in losses)
    for other in others:
        assert all(map(torch.equal, first, other))


REJECTED = {
    "beta": (NAMES[0], {"jsd_beta": 1.5}, "jsd_beta: got 1.5"),
    "temperature": (NAMES[0], {"temperature": 0.0}, "temperature: got 0.0"),
    "accum_dtype": (NAMES[1], {"accum_dtype": torch.float64}, "accum_dtype: got torch.float64"),
    "reduction": (NAMES[1], {"reduction": "none"}, "linear_kl_to_probs"),
}


@pytest.mark.parametrize(("name", "options", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects(name, options, message):
    with pytest.raises(UserError, match=message):
        getattr(liger, name)(**options)


def test_example(capsys):
    example = importlib.import_module("examples.liger")
    before, after = example.main()
    assert after < before
    assert "nats per token" in capsys.readouterr().out
    assert example.fused_step()() == pytest.approx(example.eager_step()().item(), rel=1e-5)

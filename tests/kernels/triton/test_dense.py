"""Row kernels of the dense losses and of softmaxes, launched directly, against float64.

Shapes (C, V): (1, 1), (7, 1423) odd and within one block of ids, (3, 4096) whole blocks, (2, 20000)
many blocks and a rest. What only the driver adds is tested in tests/kernels/test_lm_head.py.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton back-end needs Triton")

import triton
import triton.language as tl

from bidistill_kernels import (
    LogitTransform,
)
from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._triton import bidirectional_kl, cross_entropy, jsd, kl_to_probs, pieces
from bidistill_kernels._triton.launch import TritonLogits
from tests.kernels.cases import DEVICE
from tests.kernels.row_losses import (
    EDGES,
    GIVEN,
    Loss,
    RowLosses,
    check_given,
    check_masked,
    given,
    masked,
)
from tests.support import assert_close

# the interpreter is NumPy, which warns of lanes that hold -inf and of branches that are not taken
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow):RuntimeWarning"
)
inf, nan = torch.inf, torch.nan
SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ROWS = RowLosses(bidirectional_kl, jsd, kl_to_probs, cross_entropy)
FORWARD = ROWS.FORWARD
REVERSE = ROWS.REVERSE
MIX = ROWS.MIX
CE = ROWS.CE
PROBS = ROWS.PROBS
LOSSES = ROWS.LOSSES
PAIRS = ROWS.PAIRS
kl = ROWS.kl
jsd_of = ROWS.jsd_of


class Model(NamedTuple):
    """Raw logits, what else makes them final, and a copy that a kernel may overwrite."""

    raw: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()

    def final(self, raw: Tensor) -> Tensor:
        return self.transform(raw if self.bias is None else raw + self.bias.to(raw.dtype))

    def logits(self, kind: Any = TritonLogits, raw: Tensor | None = None) -> Any:
        raw = self.raw.clone() if raw is None else raw
        return kind(raw, self.bias, self.transform)


PLAIN = LogitTransform()
# logits of standard deviation 5 reach the soft-cap and have a softmax whose largest entry is O(1)
CAPPED = LogitTransform(scale=1.25, softcap=20.0, temperature=0.75)
TRANSFORMS = pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "transformed"])


def strided(raw: Tensor) -> Tensor:
    """The same rows in a wider buffer, whose rest is NaN."""
    C, V = raw.shape
    buffer = torch.full((C, V + 5), nan, device=DEVICE)
    buffer[:, :V] = raw
    return buffer[:, :V]


def draw(shape: tuple[int, int], transform: LogitTransform = PLAIN) -> tuple[Model, Model, Tensor]:
    """Student, a teacher that differs, and targets."""
    C, V = shape
    raw = torch.randn(2, C, V) * 5
    bias = [None, None] if transform is PLAIN else [torch.randn(V).to(DEVICE) for _ in range(2)]
    student, teacher = (Model(strided(raw[i].to(DEVICE)), bias[i], transform) for i in range(2))
    return student, teacher, torch.randint(V, (C,)).to(DEVICE)


def run(loss: Loss, student: Any, teacher: Any, target: Any, gradient: Tensor | None) -> RowResult:
    """Call a kernel's launcher; the teacher is left out where the loss has none."""
    teacher = None if loss is CE else loss.teacher(teacher).logits()
    return loss.rows(Chunk(student, teacher, target, gradient, gradient is not None), loss.params)


def fused(
    loss: Loss, student: Model, teacher: Model, target: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[RowResult, Tensor]:
    """Result and gradient, in memory of its own, whose rows are twice as long as they need be."""
    C, V = student.raw.shape
    gradient = torch.full((C, 2 * V), nan, dtype=dtype, device=DEVICE)[:, :V]
    return run(loss, student.logits(), teacher, target, gradient), gradient


def reference(
    loss: Loss, student: Model, teacher: Model, target: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the raw logits but for the constant factor."""
    raw = student.raw.to(dtype).requires_grad_()
    other = loss.teacher(teacher)
    rows = loss.reference(student.final(raw), other.final(other.raw.to(dtype)), target)
    (gradient,) = torch.autograd.grad(rows.sum(), raw)
    return rows.detach(), gradient / student.transform.factor


def close(name: str, actual: Tensor, expected64: Tensor, own: Tensor) -> None:
    assert_close(name, actual.cpu(), expected64.cpu(), own.cpu())


@LOSSES
@TRANSFORMS
@pytest.mark.parametrize("shape", [(1, 1), (7, 1423), (3, 4096), (2, 20_000)], ids=str)
def test_matches_reference(loss, transform, shape):
    student, teacher, target = draw(shape, transform)
    result, gradient = fused(loss, student, teacher, target)
    expected, expected_gradient = reference(loss, student, teacher, target)
    own, own_gradient = reference(loss, student, teacher, target, torch.float32)
    close("loss", result.loss_C, expected, own)
    close("gradient", gradient, expected_gradient, own_gradient)
    models = (student,) if loss is CE else (student, teacher)
    for model, lse in zip(models, result.stats, strict=False):
        close("lse", lse, model.final(model.raw.double()).logsumexp(-1), lse)
    if loss is MIX:
        for part, stat in zip((FORWARD, REVERSE), result.stats[2:], strict=True):
            own = reference(part, student, teacher, target, torch.float32)[0]
            close("divergence", stat, reference(part, student, teacher, target)[0], own)


@LOSSES
@TRANSFORMS
@SIXTEEN
def test_sixteen_bit_gradient_in_place_of_the_logits(loss, transform, dtype):
    """Row n of the gradient starts where row n of the logits does: not a bit may change."""
    student, teacher, target = draw((2, 5120), transform)
    result, gradient = fused(loss, student, teacher, target, dtype)
    expected = reference(loss, student, teacher, target)[1]
    close("gradient", gradient, expected, expected.to(dtype))
    V = student.raw.shape[1]
    raw = student.raw.contiguous()
    shared = raw.view(dtype)[:, :V]
    again = run(loss, student.logits(raw=raw), teacher, target, shared)
    assert torch.equal(shared, gradient)
    assert torch.equal(again.loss_C, result.loss_C)
    # the other half of each row is as it was
    assert torch.equal(raw[:, V // 2 :], student.raw[:, V // 2 :])


@LOSSES
def test_gradient_in_place_of_the_logits_and_none(loss):
    student, teacher, target = draw((2, 2500))
    result, gradient = fused(loss, student, teacher, target)
    raw = student.raw.clone()
    run(loss, student.logits(raw=raw), teacher, target, raw)
    assert torch.equal(raw, gradient)
    raw = student.raw.clone()
    no_gradient = run(loss, student.logits(raw=raw), teacher, target, None)
    assert torch.equal(raw, student.raw)
    for actual, expected in zip(
        (no_gradient.loss_C, *no_gradient.stats), (result.loss_C, *result.stats), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@LOSSES
def test_one_side_transformed(loss):
    """A soft-cap, a bias or neither: each model has its own."""
    student, teacher, target = draw((3, 300), CAPPED)
    for one, other in (
        (Model(student.raw), teacher),
        (student, Model(teacher.raw)),
        (Model(student.raw, None, CAPPED), Model(teacher.raw, teacher.bias)),
        (Model(student.raw, None, LogitTransform(scale=-0.5)), teacher),
    ):
        result, gradient = fused(loss, one, other, target)
        expected, own = (
            reference(loss, one, other, target, d) for d in (torch.float64, torch.float32)
        )
        close("loss", result.loss_C, expected[0], own[0])
        close("gradient", gradient, expected[1], own[1])


@PAIRS
@pytest.mark.parametrize("constant", [0, 37.0])
def test_accurate_where_the_models_nearly_agree(loss, constant):
    """Divergences of 2e-6, of which a difference of log-sum-exps has no digit left in float32."""
    raw = torch.randn(2, 4000, device=DEVICE) * 6
    teacher = raw + torch.randn(2, 4000, device=DEVICE) * 2e-3
    # which means nothing, but takes a bit or two of the logits with it
    student, teacher, target = (
        Model(raw),
        Model(teacher + constant),
        torch.zeros(2, dtype=torch.int64),
    )
    result, gradient = fused(loss, student, teacher, target)
    expected, expected_gradient = reference(loss, student, teacher, target)
    assert expected.max() < 1e-5
    assert ((result.loss_C - expected) / expected).abs().max() < 2e-4
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-3


@PAIRS
def test_equal_models(loss):
    raw = torch.randn(2, 3000, device=DEVICE) * 6
    result, gradient = fused(loss, Model(raw), Model(raw), torch.zeros(2, dtype=torch.int64))
    assert not result.loss_C.any()
    assert not gradient.any()


@LOSSES
def test_logits_of_ten_thousand(loss):
    s = torch.randn(6, 2500, device=DEVICE)
    s[:, 3], s[:, 4] = 1e4, -1e4
    t = s + torch.randn(6, 2500, device=DEVICE) * 0.1
    t[3:] = t[3:].roll(2000, -1)
    target = torch.tensor([3, 4, 2499, 3, 4, 5], device=DEVICE)
    inputs = loss, Model(s), Model(t), target
    result, gradient = fused(*inputs)
    expected, own = (reference(*inputs, d) for d in (torch.float64, torch.float32))
    close("loss", result.loss_C, expected[0], own[0])
    close("gradient", gradient, expected[1], own[1])


@LOSSES
def test_confident_row(loss):
    """A target with p = 1 - 1e-6: p - 1 is formed in float32, before any rounding to 16 bits."""
    s = torch.full((1, 3000), -20.0, device=DEVICE)
    s[0, 2500], s[0, 7] = 14, 0
    t, target = torch.randn(1, 3000, device=DEVICE), torch.tensor([2500], device=DEVICE)
    inputs = loss, Model(s), Model(t), target
    result, gradient = fused(*inputs, torch.bfloat16)
    expected, own = (reference(*inputs, d) for d in (torch.float64, torch.float32))
    close("loss", result.loss_C, expected[0], own[0])
    close("gradient", gradient, expected[1], own[1].bfloat16())


@pytest.mark.parametrize(
    "loss",
    [FORWARD, REVERSE, jsd_of(0.3), PROBS, CE],
    ids=["forward", "reverse", "jsd", "probs", "ce"],
)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("peak", [0.0, 300.0])
def test_masked_ids(loss, edge, peak):
    """Losses of the reference; gradients, which are not finite everywhere, of the torch back-end.

    With a peak of 300 most ids have a probability of 0 in float32, and no part in an infinity.
    """
    s, t, target = (x.to(DEVICE) for x in masked(edge, peak))
    check_masked(loss, Model(s), Model(t), target, fused, reference)


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("eps", [0.0, 1e-10, 0.01])
def test_given_probabilities(kind, eps):
    s, q = (x.to(DEVICE) for x in given(kind))
    check_given(ROWS.probs_of(eps), Model(s), Model(q), fused, reference)


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("side", [0, 1])
def test_no_probability_hides_a_nan(value, side):
    """Of a logit whose id, or whose row, is given the probability 0; or of one probability."""
    pair = torch.randn(2, 500, device=DEVICE), torch.zeros(2, 500, device=DEVICE)
    pair[1][0, 7] = 1
    pair[side][:, 499] = value
    result, gradient = fused(ROWS.probs_of(1e-10), *map(Model, pair), torch.tensor([0, 0]))
    assert result.loss_C.isnan().all()
    assert gradient.isnan().all()


@LOSSES
@pytest.mark.parametrize(("value", "where"), [(nan, 2499), (inf, 0)])
@pytest.mark.parametrize("side", [0, 1])
def test_an_input_nan_shows_in_its_row_alone(loss, value, where, side):
    pair = torch.randn(2, 2, 2500, device=DEVICE)
    pair[side, 1, where] = value
    target = torch.tensor([7, 8], device=DEVICE)
    inputs = loss, Model(pair[0]), Model(pair[1]), target
    result, gradient = fused(*inputs)
    bad = loss is not CE or side == 0
    assert result.loss_C.isnan().tolist() == [False, bad]
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all() if bad else gradient[1].isfinite().all()


def test_a_target_that_does_not_exist_shows():
    student, teacher, _ = draw((3, 300))
    target = torch.tensor([-1, 300, 5], device=DEVICE)
    for loss in (CE, MIX):
        result, _ = fused(loss, student, teacher, target)
        assert result.loss_C.isnan().tolist() == [True, True, False]


def test_a_target_that_is_ruled_out():
    student, teacher, target = draw((2, 300))
    student.raw[0, target[0]] = -inf
    for loss in (CE, kl(0.5, 0.0, 1.0)):
        result, gradient = fused(loss, student, teacher, target)
        assert (result.loss_C == inf).tolist() == [True, False]
        assert gradient.isfinite().all()


def test_no_target():
    student, teacher, target = draw((2, 300))
    with_target, without = (fused(FORWARD, student, teacher, y) for y in (target, None))
    assert torch.equal(with_target[0].loss_C, without[0].loss_C)
    assert torch.equal(with_target[1], without[1])


@LOSSES
def test_no_rows(loss):
    student, teacher, target = draw((0, 300))
    result, gradient = fused(loss, student, teacher, target)
    assert result.loss_C.shape == (0,)
    assert gradient.shape == (0, 300)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs 16 GiB")
@LOSSES
def test_rows_beyond_2_31_elements(loss):
    small, teacher, target = draw((2, 5000))
    raw = torch.empty(2**31 + 5000, device=DEVICE).as_strided((2, 5000), (2**31, 1))
    raw.copy_(small.raw)
    result, gradient = fused(loss, small, teacher, target)
    again = run(loss, small.logits(raw=raw), teacher, target, raw)
    assert torch.equal(again.loss_C, result.loss_C)
    assert torch.equal(raw, gradient)


@LOSSES
def test_deterministic(loss):
    inputs = draw((1, 2500), CAPPED)
    one, other = fused(loss, *inputs), fused(loss, *inputs)
    assert torch.equal(one[0].loss_C, other[0].loss_C)
    assert torch.equal(one[1], other[1])


def softmax_reference(final: Tensor, base: Tensor, factor: Tensor, transform: LogitTransform):
    gradient = (final - base[:, None]).exp() * factor[:, None]
    return gradient if transform.softcap is None else gradient * transform.slope(final)


NEGATIVE = LogitTransform(scale=-2.0, temperature=1.5)


@pytest.mark.parametrize(
    "transform", [PLAIN, CAPPED, NEGATIVE], ids=["plain", "capped", "negative"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_softmax_gradient_after_masking(transform, dtype):
    model, _, _ = draw((3, 4500), transform)
    ids = torch.stack([torch.randperm(4500)[:50] for _ in range(3)]).to(DEVICE)
    raw = model.raw.contiguous()
    logits = model.logits(raw=raw)
    final = model.final(model.raw.double())
    close("at", logits.at(ids), final.gather(1, ids), model.final(model.raw).gather(1, ids))
    close("lse", logits.log_sum_exp(), final.logsumexp(-1), model.final(model.raw).logsumexp(-1))
    logits.mask_(ids)
    final.scatter_(1, ids, -inf)
    assert (logits.at(ids) == -inf).all()
    lse = logits.log_sum_exp()
    close("lse", lse, final.logsumexp(-1), final.float().logsumexp(-1))
    values, capped = torch.randn(3, 50, device=DEVICE), torch.linspace(-26, 26, 50, device=DEVICE)
    slope = 1 if transform.softcap is None else transform.slope(capped)
    torch.testing.assert_close(logits.chain(values, capped.expand(3, -1)), values * slope)
    factor = torch.tensor([[0.5, 9], [-2.0, 9], [0.0, 9]], device=DEVICE)[:, 0]
    expected = softmax_reference(final, lse.double(), factor.double(), transform)
    expected = expected.masked_fill(final.isneginf(), 0)
    gradient = torch.full((3, 9000), nan, device=DEVICE, dtype=dtype)[:, :4500]
    logits.softmax_gradient(lse, factor, gradient)
    own = softmax_reference(final.float(), lse, factor, transform)
    close("gradient", gradient, expected, own.masked_fill(final.isneginf(), 0).to(dtype))
    shared = raw.view(dtype)[:, :4500]
    logits.softmax_gradient(lse, factor, shared)
    assert torch.equal(shared, gradient)


def test_softmax_of_nothing_and_of_odd_rows():
    raw = torch.randn(4, 2500, device=DEVICE)
    raw[0], raw[1, 7], raw[2, 7] = -inf, nan, inf
    logits = Model(raw).logits()
    lse = logits.log_sum_exp()
    assert lse[0] == -inf
    assert lse.isfinite().tolist() == [False, False, False, True]
    gradient = torch.empty_like(raw)
    factor = torch.ones(4, device=DEVICE)
    logits.softmax_gradient(lse, factor, gradient)
    assert not gradient[0].any()
    assert gradient[1:3].isnan().all(1).tolist() == [True, True]
    torch.testing.assert_close(gradient[3], raw[3].softmax(0))
    # ids that are there, and a base which says that nothing is
    logits.softmax_gradient(torch.full((4,), -inf, device=DEVICE), factor, gradient)
    assert not gradient.any()


def test_top_sees_masked_ids_last():
    model, _, _ = draw((2, 70), CAPPED)
    logits = model.logits()
    best = logits.top(3)
    logits.mask_(best)
    final = model.final(model.raw).scatter(1, best, -inf)
    assert torch.equal(logits.top(3), final.topk(3).indices)


@triton.jit
def _pieces_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, pieces.exp_remainder(x))
    value, below = pieces.log1p(x, 1.0 + x)
    tl.store(y_ptr + BLOCK + offs, value)
    tl.store(y_ptr + 2 * BLOCK + offs, below)
    value, slope = pieces.tanh(x)
    tl.store(y_ptr + 3 * BLOCK + offs, value)
    tl.store(y_ptr + 4 * BLOCK + offs, slope)


def test_elementary_functions():
    """Relative errors, everywhere: what pieces.py says, and room for a GPU's exp."""

    def run(x):
        y = torch.empty(5, 4096, device=DEVICE)
        _pieces_kernel[(1,)](x.to(DEVICE), y, BLOCK=4096, enable_fp_fusion=True)
        return y.cpu()

    def error(actual, expected):
        return ((actual - expected) / expected)[expected != 0].abs().max().item()

    for size in (1.0, 1e-2, 1e-4):
        x = torch.linspace(-size, size, 4096)
        powers = x.double()[:, None] ** torch.arange(25)
        factorials = torch.arange(2.0, 27, dtype=torch.float64).add(1).lgamma().exp()
        assert error(run(x)[0], (powers / factorials).sum(1)) < 2e-7
    for low, high in ((-0.999, 2.7), (-0.29, 0.41), (-1e-2, 1e-2), (-1e-7, 1e-7)):
        x = torch.linspace(low, high, 4096)
        y = run(x)
        assert error(y[1], x.double().log1p()) < 3e-7
        if 1e-2 < high < 0.42:
            assert error(y[2], x.double() - x.double().log1p()) < 3e-7
    for size in (1e-3, 0.7, 3, 20):
        x = torch.linspace(-size, size, 4096)
        y = run(x)
        assert error(y[3], x.double().tanh()) < 5e-7
        assert error(y[4], 1 / x.double().cosh() ** 2) < 4e-6
    y = run(torch.tensor([nan, inf, -inf, 0] * 1024))[:, :4].tolist()
    assert [str(value) for value in y[3]] == ["nan", "1.0", "-1.0", "0.0"]
    assert [str(value) for value in y[4]] == ["nan", "0.0", "0.0", "1.0"]
    assert y[1][0] != y[1][0]

"""Row kernels in each instruction set, called through the row functions, against float64.

Shapes (C, V): (1, 1), (5, 13) less than a vector of any set but one, (3, 1423) one block and a part
of a vector, (2, 20000) many blocks. What only the driver adds is tested in
tests/kernels/test_lm_head.py, which runs the instruction set in use.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bidistill_kernels import (
    LogitTransform,
)
from bidistill_kernels._native import bidirectional_kl, cross_entropy, jsd, kl_to_probs
from bidistill_kernels._native.logits import NativeLogits
from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._top import top_ids
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

pytestmark = pytest.mark.usefixtures("isa")
inf, nan = torch.inf, torch.nan
ROWS = RowLosses(bidirectional_kl, jsd, kl_to_probs, cross_entropy)
FORWARD = ROWS.FORWARD
REVERSE = ROWS.REVERSE
MIX = ROWS.MIX
CE = ROWS.CE
PROBS = ROWS.PROBS
LOSSES = ROWS.LOSSES
PAIRS = ROWS.PAIRS
jsd_of = ROWS.jsd_of
PLAIN = LogitTransform()
# logits of standard deviation 5 reach the soft-cap and have a softmax whose largest entry is O(1)
CAPPED = LogitTransform(scale=1.25, softcap=20.0, temperature=0.75)
NEGATIVE = LogitTransform(scale=-2.0, temperature=1.5)
TRANSFORMS = pytest.mark.parametrize(
    "transform", [PLAIN, CAPPED, NEGATIVE], ids=["plain", "capped", "negative"]
)


class Model(NamedTuple):
    """Raw logits, and what else makes them final."""

    raw: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = PLAIN

    def final(self, dtype: torch.dtype = torch.float64, raw: Tensor | None = None) -> Tensor:
        raw = self.raw.to(dtype) if raw is None else raw
        return self.transform(raw if self.bias is None else raw + self.bias.to(dtype))

    def logits(self, kind: Any = NativeLogits) -> Any:
        """Logits in memory of their own, whose rows lie apart with NaN between them."""
        C, V = self.raw.shape
        raw = torch.full((C, V + 5), nan)[:, :V].copy_(self.raw)
        return kind(raw, self.bias, self.transform)


def draw(shape: tuple[int, int], transform: LogitTransform = PLAIN) -> tuple[Model, Model, Tensor]:
    """Student, a teacher that differs, and targets."""
    C, V = shape
    raw = torch.randn(2, C, V) * 5
    bias = [None, None] if transform is PLAIN else list(torch.randn(2, V))
    student, teacher = (Model(raw[i], bias[i], transform) for i in range(2))
    return student, teacher, torch.randint(V, (C,))


def fused(
    loss: Loss, student: Model, teacher: Model, target: Tensor | None, *, in_place: bool = False
) -> tuple[RowResult, Tensor]:
    """Result and gradient, over the logits or in memory of its own."""
    C, V = student.raw.shape
    logits = student.logits()
    gradient = logits.raw_CV if in_place else torch.full((C, 2 * V), nan)[:, :V]
    return call(loss, logits, teacher, target, gradient), gradient


def call(
    loss: Loss, student: Any, teacher: Model, target: Tensor | None, gradient: Tensor | None
) -> RowResult:
    other = None if loss is CE else loss.teacher(teacher).logits()
    return loss.rows(Chunk(student, other, target, gradient, gradient is not None), loss.params)


def reference(
    loss: Loss, student: Model, teacher: Model, target: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the raw logits but for the constant factor."""
    raw = student.raw.to(dtype).requires_grad_()
    rows = loss.reference(student.final(dtype, raw), loss.teacher(teacher).final(dtype), target)
    (gradient,) = torch.autograd.grad(rows.sum(), raw)
    return rows.detach(), gradient / student.transform.factor


def check(loss: Loss, student: Model, teacher: Model, target: Tensor) -> RowResult:
    """Compare loss and gradient with float64."""
    result, gradient = fused(loss, student, teacher, target)
    expected, own = (
        reference(loss, student, teacher, target, d) for d in (torch.float64, torch.float32)
    )
    assert_close("loss", result.loss_C, expected[0], own[0])
    assert_close("gradient", gradient, expected[1], own[1])
    return result


@LOSSES
@TRANSFORMS
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (3, 1423), (2, 20_000)], ids=str)
def test_matches_reference(loss, transform, shape):
    student, teacher, target = draw(shape, transform)
    result = check(loss, student, teacher, target)
    for model, lse in zip((student, teacher), result.stats, strict=False):
        own = model.final(torch.float32).logsumexp(-1)
        assert_close("lse", lse, model.final().logsumexp(-1), own)
    if loss is MIX:
        for part, stat in zip((FORWARD, REVERSE), result.stats[2:], strict=True):
            own = reference(part, student, teacher, target, torch.float32)[0]
            assert_close("divergence", stat, reference(part, student, teacher, target)[0], own)


@LOSSES
def test_one_side_transformed(loss):
    """A soft-cap, a bias or neither: each model has its own."""
    student, teacher, target = draw((8, 300), CAPPED)
    check(loss, Model(student.raw), teacher, target)
    check(loss, student, Model(teacher.raw), target)
    check(loss, Model(student.raw, None, CAPPED), Model(teacher.raw, teacher.bias), target)
    check(loss, Model(student.raw, None, LogitTransform(temperature=2.0)), teacher, target)


@LOSSES
@TRANSFORMS
def test_in_place_and_without_gradient(loss, transform):
    student, teacher, target = draw((3, 2500), transform)
    result, gradient = fused(loss, student, teacher, target)
    again, same = fused(loss, student, teacher, target, in_place=True)
    assert torch.equal(same, gradient)
    without = call(loss, student.logits(), teacher, target, None)
    for other in (again, without):
        assert torch.equal(other.loss_C, result.loss_C)
        assert all(map(torch.equal, other.stats, result.stats))


@LOSSES
def test_nothing_between_the_rows_is_read_or_written(loss):
    student, teacher, target = draw((3, 1427), CAPPED)
    wide = torch.full((3, 3 * 1427), 7.0)
    logits, gradient = wide[:, :1427].copy_(student.raw), wide[:, 2000:3427]
    call(loss, NativeLogits(logits, student.bias, CAPPED), teacher, target, gradient)
    assert torch.equal(gradient, fused(loss, student, teacher, target)[1])
    wide[:, :1427] = wide[:, 2000:3427] = 7
    assert (wide == 7).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@LOSSES
@pytest.mark.parametrize("shape", [(37, 2500), (400, 31)], ids=str)
def test_any_number_of_threads_gives_equal_bits(loss, shape, threads):
    inputs = draw(shape, CAPPED)
    results = []
    for count in (1, 2, 3, 50):
        threads(count)
        result, gradient = fused(loss, *inputs)
        results.append(torch.cat([result.loss_C, *result.stats, gradient.flatten()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@PAIRS
@pytest.mark.parametrize("constant", [0, 37.0])
def test_accurate_where_the_models_nearly_agree(loss, constant):
    """Divergences of 2e-6, of which a difference of log-sum-exps has no digit left in float32."""
    raw = torch.randn(2, 4000) * 6
    teacher = raw + torch.randn(2, 4000) * 2e-3
    # the constant means nothing, but takes a bit or two of the logits with it
    inputs = Model(raw), Model(teacher + constant), torch.zeros(2, dtype=torch.int64)
    result, gradient = fused(loss, *inputs)
    expected, expected_gradient = reference(loss, *inputs)
    assert expected.max() < 1e-5
    assert ((result.loss_C - expected) / expected).abs().max() < 2e-4
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-3


@PAIRS
def test_equal_models(loss):
    raw = torch.randn(2, 3000) * 6
    result, gradient = fused(loss, Model(raw), Model(raw), torch.zeros(2, dtype=torch.int64))
    assert not result.loss_C.any()
    assert not gradient.any()


@LOSSES
def test_logits_of_ten_thousand(loss):
    s = torch.randn(6, 2500)
    s[:, 3], s[:, 4] = 1e4, -1e4
    t = s + torch.randn(6, 2500) * 0.1
    t[3:] = t[3:].roll(2000, -1)
    check(loss, Model(s), Model(t), torch.tensor([3, 4, 2499, 3, 4, 5]))


@LOSSES
def test_denormal_logits_and_zeros(loss):
    s, t = torch.randn(2, 4, 1500) * 1e-39
    s[1], t[2] = 0, 0
    result, gradient = fused(loss, Model(s), Model(t), torch.tensor([0, 1, 2, 1499]))
    expected, expected_gradient = reference(loss, Model(s), Model(t), torch.tensor([0, 1, 2, 1499]))
    # equal models: that loss is a difference of entropies
    atol = 1e-6 if loss is PROBS else 1e-12
    torch.testing.assert_close(result.loss_C.double(), expected, rtol=1e-6, atol=atol)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-10)


@LOSSES
def test_rising_and_falling_logits(loss):
    """The running maximum grows in every block, or never; ids of the first blocks vanish."""
    ramp = torch.linspace(-200, 200, 9000).repeat(2, 1)
    s, t = ramp * torch.tensor([[1], [-1.0]]), ramp * torch.tensor([[-1], [-0.5]])
    check(loss, Model(s), Model(t), torch.tensor([8999, 0]))


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
    s, t, target = masked(edge, peak)
    check_masked(loss, Model(s), Model(t), target, fused, reference)


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("eps", [0.0, 1e-10, 0.01])
def test_given_probabilities(kind, eps):
    s, q = given(kind)
    check_given(ROWS.probs_of(eps), Model(s), Model(q), fused, reference)


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("side", [0, 1])
def test_no_probability_hides_a_nan(value, side):
    """Of a logit whose id, or whose row, is given the probability 0; or of one probability."""
    pair = torch.randn(2, 500), torch.zeros(2, 500)
    pair[1][0, 7] = 1
    pair[side][:, 499] = value
    result, gradient = fused(ROWS.probs_of(1e-10), *map(Model, pair), torch.tensor([0, 0]))
    assert result.loss_C.isnan().all()
    assert gradient.isnan().all()


@LOSSES
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("where", [0, 2499])
@pytest.mark.parametrize("side", [0, 1])
def test_an_input_nan_shows_in_its_row_alone(loss, value, where, side):
    pair = torch.randn(2, 2, 2500)
    pair[side, 1, where] = value
    inputs = Model(pair[0]), Model(pair[1]), torch.tensor([7, 8])
    result, gradient = fused(loss, *inputs)
    bad = loss is not CE or side == 0
    assert result.loss_C.isnan().tolist() == [False, bad]
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all() if bad else gradient[1].isfinite().all()


@LOSSES
def test_a_row_of_nothing_is_nan(loss):
    pair = torch.randn(2, 2, 70)
    pair[0, 1] = -inf
    result, _ = fused(loss, Model(pair[0]), Model(pair[1]), torch.tensor([7, 8]))
    assert result.loss_C.isnan().tolist() == [False, True]
    assert result.stats[0][1] == -inf


@pytest.mark.parametrize("loss", [CE, MIX], ids=["cross_entropy", "bidirectional_kl"])
def test_a_target_that_does_not_exist_shows(loss):
    student, teacher, _ = draw((3, 300))
    result, _ = fused(loss, student, teacher, torch.tensor([-1, 300, 5]))
    assert result.loss_C.isnan().tolist() == [True, True, False]


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


def softmax_reference(final: Tensor, base: Tensor, factor: Tensor, transform: LogitTransform):
    gradient = (final - base[:, None]).exp() * factor[:, None]
    return gradient if transform.softcap is None else gradient * transform.slope(final)


@TRANSFORMS
def test_softmax_gradient_after_masking(transform):
    model, _, _ = draw((3, 4500), transform)
    ids = torch.stack([torch.randperm(4500)[:50] for _ in range(3)])
    logits, final, final32 = model.logits(), model.final(), model.final(torch.float32)
    assert_close("lse", logits.log_sum_exp(), final.logsumexp(-1), final32.logsumexp(-1))
    assert_close("at", logits.at(ids), final.gather(1, ids), final32.gather(1, ids))
    logits.mask_(ids)
    final.scatter_(1, ids, -inf)
    assert (logits.at(ids) == -inf).all()
    lse = logits.log_sum_exp()
    assert_close("lse", lse, final.logsumexp(-1), final.float().logsumexp(-1))
    values, capped = torch.randn(3, 50), torch.linspace(-26, 26, 50)
    slope = 1 if transform.softcap is None else transform.slope(capped)
    torch.testing.assert_close(logits.chain(values, capped.expand(3, -1)), values * slope)
    factor = torch.tensor([[0.5, 9], [-2.0, 9], [0.0, 9]])[:, 0]
    expected = softmax_reference(final, lse.double(), factor.double(), transform)
    gradient = torch.full((3, 9000), nan)[:, :4500]
    logits.softmax_gradient(lse, factor, gradient)
    own = softmax_reference(final.float(), lse, factor, transform)
    masked = final.isneginf()
    assert_close("gradient", gradient, expected.masked_fill(masked, 0), own.masked_fill(masked, 0))
    logits.softmax_gradient(lse, factor, logits.raw_CV)
    assert torch.equal(logits.raw_CV, gradient)


def test_softmax_of_nothing_and_of_odd_rows():
    raw = torch.randn(4, 2500)
    raw[0], raw[1, 7], raw[2, 7] = -inf, nan, inf
    logits = Model(raw).logits()
    lse = logits.log_sum_exp()
    assert lse[0] == -inf
    assert lse.isfinite().tolist() == [False, False, False, True]
    gradient = torch.full((4, 2500), nan)
    logits.softmax_gradient(lse, torch.ones(4), gradient)
    assert not gradient[0].any()
    assert gradient[1].isnan().all()


def top_reference(final: Tensor, k: int) -> Tensor:
    """By sorting all of it: NaN largest, lowest id first on ties, -0 equal to 0."""
    return (final + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("k", [0, 1, 5, 64, 1423, 2000])
@pytest.mark.parametrize("kind", ["random", "ties", "falling", "rising", "masked", "nan", "zeros"])
def test_top(kind, k):
    raw = torch.randn(3, 1423)
    if kind == "ties":
        raw = raw.mul(2).round()
    elif kind in ("falling", "rising"):
        raw = raw.sort(dim=-1, descending=kind == "falling").values
    elif kind == "masked":
        raw[:, torch.randperm(1423)[:1400]] = -inf
    elif kind == "nan":
        raw[0, ::7], raw[1], raw[2, 1422] = nan, nan, nan
    elif kind == "zeros":
        raw = torch.zeros(3, 1423).copysign(raw)
    ids = Model(raw).logits().top(k)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, top_reference(raw, k))


@TRANSFORMS
def test_top_of_final_logits(transform):
    model, _, _ = draw((4, 3000), transform)
    logits = model.logits()
    ids = logits.top(20)
    assert torch.equal(ids, top_ids(logits.at(torch.arange(3000).expand(4, -1)), 20))
    exact = model.final()
    torch.testing.assert_close(exact.gather(1, ids), exact.topk(20).values, rtol=1e-5, atol=1e-5)

"""The dense row functions of a back-end under test, each with its specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, inf, nan

from bidistill_kernels import (
    bidirectional_kl_reference,
    cross_entropy_reference,
    jsd_reference,
    kl_to_probs_reference,
)
from bidistill_kernels._rows import ROW_LOSSES, Chunk, RowResult
from bidistill_kernels._torch_rows import TorchLogits
from tests.support import assert_close

# ids that (student, teacher) rule out, of 2500
EDGES = {
    "teacher": ([], [2, 2499]),
    "student": ([2, 2499], []),
    "both": ([2, 2499], [2, 2499]),
    "different": ([2, 5], [2499]),
    "first": ([0], [0, 1]),
    "first blocks": (range(2200), range(2200)),
    "first blocks of one": ([], range(2200)),
    "all but one": (range(1, 2500), range(1, 2500)),
}
# rows of logits and of probabilities as no two models give them, for a loss that is given these
GIVEN = ("not normalised", "zeros", "sparse", "ruled out", "one id", "tiny")


class Loss(NamedTuple):
    """A row function under test and its specification."""

    name: str
    rows: Callable[..., RowResult]
    params: tuple[float, ...]
    reference: Callable[[Tensor, Tensor, Tensor], Tensor]
    softmax: bool = False
    """It is given the teacher's probabilities in place of logits."""

    def teacher(self, model: Any) -> Any:
        """Return the teacher as the loss is given it."""
        if not self.softmax:
            return model
        raw = model.raw if model.bias is None else model.raw + model.bias
        return type(model)(model.transform(raw).softmax(-1))


class RowLosses:
    """The losses of one back-end, from its modules."""

    def __init__(self, bidirectional_kl: Any, jsd: Any, kl_to_probs: Any, cross_entropy: Any):
        self._kl, self._jsd, self._probs = bidirectional_kl.rows, jsd.rows, kl_to_probs.rows
        self.FORWARD, self.REVERSE = self.kl(1, 0, 0), self.kl(0, 1, 0)
        self.MIX = self.kl(0.3, 0.5, 0.2)
        self.CE = Loss(
            "cross_entropy", cross_entropy.rows, (), lambda s, t, y: cross_entropy_reference(s, y)
        )
        self.PROBS = self.probs_of(1e-10)._replace(softmax=True)
        self.LOSSES = pytest.mark.parametrize(
            "loss",
            [self.MIX, self.jsd_of(0.4), self.PROBS, self.CE],
            ids=["bidirectional_kl", "jsd", "kl_to_probs", "cross_entropy"],
        )
        self.PAIRS = pytest.mark.parametrize(
            "loss",
            [self.FORWARD, self.REVERSE, *map(self.jsd_of, (0.5, 0.1, 0.9))],
            ids=["forward", "reverse", "jsd_0.5", "jsd_0.1", "jsd_0.9"],
        )

    def kl(self, forward: float, reverse: float, ce: float) -> Loss:
        weights = {"forward": forward, "reverse": reverse, "cross_entropy": ce}
        return Loss(
            "bidirectional_kl",
            self._kl,
            (forward, reverse, ce),
            lambda s, t, y: bidirectional_kl_reference(s, t, y, **weights),
        )

    def jsd_of(self, beta: float) -> Loss:
        return Loss("jsd", self._jsd, (beta,), lambda s, t, y: jsd_reference(s, t, beta=beta))

    def probs_of(self, eps: float) -> Loss:
        return Loss(
            "kl_to_probs", self._probs, (eps,), lambda s, q, y: kl_to_probs_reference(s, q, eps=eps)
        )


def masked(edge: str, peak: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher with ids ruled out, (1, 2500), and a target that is not."""
    s, t = torch.randn(2, 1, 2500).unbind()
    s[0, 2300] = peak
    for side, ids in zip((s, t), EDGES[edge], strict=True):
        side[0, list(ids)] = -inf
    return s, t, torch.tensor([0 if edge == "all but one" else 2300])


def given(kind: str) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of the kinds in `GIVEN`, (1, 2500)."""
    s, q = torch.randn(1, 2500) * 3, (torch.randn(1, 2500) * 3).softmax(-1)
    if kind == "not normalised":
        q *= 1.7
    elif kind == "zeros":
        q.zero_()
    elif kind == "sparse":
        q[q < q.mean()] = 0
        s[0, (q[0] == 0).nonzero().squeeze(1)[::2]] = -inf
    elif kind == "ruled out":
        s[0, 2300] = -inf
    elif kind == "one id":
        q = torch.zeros(1, 2500)
        q[0, 2400] = 1
    elif kind == "tiny":
        # not normal numbers, and the smallest one that is
        q[0, ::3], q[0, 1::6] = 1e-40, 2.0**-126
    return s, q


def check_given(loss: Loss, student: Any, probs: Any, fused: Any, reference: Any) -> None:
    """Compare a back-end on odd probabilities with the reference and its gradient."""
    inputs = student, probs, torch.tensor([0])
    result, gradient = fused(loss, *inputs)
    plain, by_torch = _by_torch(loss, *inputs)
    expected, own = (reference(loss, *inputs, d)[0].cpu() for d in (torch.float64, torch.float32))
    assert_close("loss", result.loss_C.cpu(), expected, own)
    # autograd of the reference has 0 * inf = NaN where an id is ruled out
    p_CV, q_CV = student.raw.double().softmax(-1), probs.raw.double()
    expected = (p_CV * q_CV.sum(-1, keepdim=True) - q_CV).cpu()
    assert_close("gradient", gradient.cpu(), expected, by_torch.cpu())
    assert_close("lse", result.stats[0].cpu(), plain.stats[0].cpu().double(), plain.stats[0].cpu())


def check_masked(
    loss: Loss, student: Any, teacher: Any, target: Tensor, fused: Any, reference: Any
) -> None:
    """Compare a back-end on masked logits with the reference, and with the torch back-end."""

    def close(name: str, actual: Tensor, expected64: Tensor, own: Tensor) -> None:
        assert_close(name, actual.cpu(), expected64.cpu(), own.cpu())

    inputs = student, teacher, target
    result, gradient = fused(loss, *inputs)
    plain, by_torch = _by_torch(loss, *inputs)
    # elsewhere float64 has 1e-16, or probabilities of 1e-130: of a peak, or where one id is left
    if student.raw[0, 2300] == 0:
        expected, own = (reference(loss, *inputs, d)[0] for d in (torch.float64, torch.float32))
        close("loss", result.loss_C, expected, own)
    for name, actual, wanted in (
        ("loss", result.loss_C, plain.loss_C),
        ("gradient", gradient, by_torch),
        *(("stats", *pair) for pair in zip(result.stats, plain.stats, strict=True)),
    ):
        assert torch.equal(actual.isfinite(), wanted.isfinite()), name
        close(name, torch.where(wanted.isnan(), nan, actual), wanted.double(), wanted)


def _by_torch(loss: Loss, student: Any, teacher: Any, target: Tensor) -> tuple[RowResult, Tensor]:
    gradient = torch.empty_like(student.raw)
    other = None if loss.name == "cross_entropy" else loss.teacher(teacher).logits(TorchLogits)
    chunk = Chunk(student.logits(TorchLogits), other, target, gradient, need_gradient=True)
    return ROW_LOSSES[loss.name].function(chunk, loss.params), gradient

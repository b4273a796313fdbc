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


class Loss(NamedTuple):
    """A row function under test and its specification."""

    name: str
    rows: Callable[..., RowResult]
    params: tuple[float, ...]
    reference: Callable[[Tensor, Tensor, Tensor], Tensor]


class RowLosses:
    """The losses of one back-end, from its modules."""

    def __init__(self, bidirectional_kl: Any, jsd: Any, cross_entropy: Any) -> None:
        self._kl, self._jsd = bidirectional_kl.rows, jsd.rows
        self.FORWARD, self.REVERSE = self.kl(1, 0, 0), self.kl(0, 1, 0)
        self.MIX = self.kl(0.3, 0.5, 0.2)
        self.CE = Loss(
            "cross_entropy", cross_entropy.rows, (), lambda s, t, y: cross_entropy_reference(s, y)
        )
        self.LOSSES = pytest.mark.parametrize(
            "loss",
            [self.MIX, self.jsd_of(0.4), self.CE],
            ids=["bidirectional_kl", "jsd", "cross_entropy"],
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


def masked(edge: str, peak: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher with ids ruled out, (1, 2500), and a target that is not."""
    s, t = torch.randn(2, 1, 2500).unbind()
    s[0, 2300] = peak
    for side, ids in zip((s, t), EDGES[edge], strict=True):
        side[0, list(ids)] = -inf
    return s, t, torch.tensor([0 if edge == "all but one" else 2300])


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
    other = None if loss.name == "cross_entropy" else teacher.logits(TorchLogits)
    chunk = Chunk(student.logits(TorchLogits), other, target, gradient, need_gradient=True)
    return ROW_LOSSES[loss.name].function(chunk, loss.params), gradient

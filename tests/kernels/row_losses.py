"""The dense row functions of a back-end under test, each with its specification."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from bidistill_kernels import (
    bidirectional_kl_reference,
    cross_entropy_reference,
    jsd_reference,
)
from bidistill_kernels._rows import RowResult


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

"""What a loss is to the driver: a row function on a chunk of logits, and the table of them.

A loss file registers its row function under a name; `lm_head.py` turns any registered function
into a fused LM-head loss. A function reaches the logits through `Logits`, which each back-end
implements, so one function may serve them all; a dense loss whose speed matters has one function
per back-end. Shapes: C rows of one chunk, V vocabulary, K ids a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from bidistill_kernels._vocabulary import WHOLE, Vocabulary
from bidistill_kernels.transform import LogitTransform


class TopK(NamedTuple):
    """A teacher that was stored: its K best ids of each token, best first, and their values.

    Example:
        >>> import torch
        >>> TopK(torch.tensor([[7, 2]]), torch.tensor([[-0.1, -2.5]])).ids.shape
        torch.Size([1, 2])
    """

    ids: Tensor
    """Token ids. Shape (N, K), int64."""
    values: Tensor
    """Log-probabilities or final logits, as the loss says; -inf marks an absent entry."""


class Logits(Protocol):
    """One model's logits of a chunk; "final" ones have gone through the logit transform."""

    raw_CV: Tensor
    """Products of hidden states and head, fp32 or fp64, cut to the vocabulary limit."""
    bias_V: Tensor | None
    transform: LogitTransform

    def at(self, ids_CK: Tensor) -> Tensor:
        """Return the final logits at the ids, (C, K)."""
        ...

    def top(self, k: int) -> Tensor:
        """Return the ids of the k largest final logits, best first, lowest id first on ties."""
        ...

    def log_sum_exp(self) -> Tensor:
        """Return the log-sum-exp of each row, (C,)."""
        ...

    def mask_(self, ids_CK: Tensor) -> None:
        """Rule the ids out: their final logits are -inf from now on."""
        ...

    def softmax_gradient(self, base_C: Tensor, factor_C: Tensor, gradient_CV: Tensor) -> None:
        """Write exp(final - base) * factor * slope of the soft-cap."""
        ...

    def chain(self, values_CK: Tensor, logits_CK: Tensor) -> Tensor:
        """Multiply gradients at ids of these final logits by the slope of the soft-cap."""
        ...


class SparseGradient(NamedTuple):
    """Gradient that touches K ids a row; an id may occur twice, its values then add up."""

    ids_CK: Tensor
    values_CK: Tensor


class Chunk(NamedTuple):
    """Input of a row function, which owns the logits and may overwrite them."""

    student: Logits
    teacher: Logits | TopK | None
    target_C: Tensor | None
    gradient_CV: Tensor | None
    """Where a dense gradient goes, in its dtype; None if none is wanted. It may share storage
    with the student's logits, row upon row."""
    need_gradient: bool
    vocabulary: Vocabulary = WHOLE
    """How the torch back-end reduces over it; the other back-ends are given whole ones only."""


class RowResult(NamedTuple):
    """Loss of each row and statistics; gradients are those of the raw logits.

    The constant factor of the logit transform and the weights of the tokens are left to the driver.
    """

    loss_C: Tensor
    stats: tuple[Tensor, ...] = ()  # shape (C,) each, in the order the loss was registered with
    sparse: SparseGradient | None = None  # of a loss that has no dense one


RowFunction: TypeAlias = Callable[[Chunk, Sequence[float]], RowResult]
Width: TypeAlias = Callable[[Sequence[float], int, int], int]


class RowLoss(NamedTuple):
    """One entry of the table."""

    function: RowFunction
    """For every back-end, or for "torch" where `dense` is set."""
    stats: tuple[str, ...]
    """Names of the statistics it returns."""
    dense: bool
    """Each back-end has a function of its own: module `_<backend>.<name>`, function `rows`."""
    width: Width | None
    """Ids a row of its sparse gradient, from (params, V, K of a stored teacher); None: dense."""
    gathers: bool
    """It only asks for logits at the stored teacher's ids: nothing is projected."""


ROW_LOSSES: dict[str, RowLoss] = {}


def row_function(
    name: str,
    stats: tuple[str, ...] = (),
    *,
    dense: bool = False,
    width: Width | None = None,
    gathers: bool = False,
) -> Callable[[RowFunction], RowFunction]:
    """Enter the decorated row function into the table under `name`; see `RowLoss`."""

    def register(rows: RowFunction) -> RowFunction:
        assert name not in ROW_LOSSES, name
        ROW_LOSSES[name] = RowLoss(rows, stats, dense, width, gathers)
        return rows

    return register

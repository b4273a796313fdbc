"""How rows of logits are reduced over the vocabulary: all of it is here, or a part on each rank.

The dense losses of the torch back-end ask a `Vocabulary` for all that takes more than one id of a
row; the rest of their arithmetic is per id. So one formula serves whole heads and sharded ones.
Shapes: C rows, V ids that are here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


class Vocabulary:
    """All ids are here, and nobody else has any."""

    def top(self, *logits_CV: Tensor) -> tuple[Tensor, ...]:
        """Return the largest logit of each row, (C, 1) for each model."""
        return tuple(part_CV.amax(-1, keepdim=True) for part_CV in logits_CV)

    def sum(self, *partial: Tensor) -> tuple[Tensor, ...]:
        """Complete sums over the ids that are here, all of one shape."""
        return partial

    def label(self, logits_CV: Tensor, target_C: Tensor) -> Tensor:
        """Return each row's logit at its target, to be completed by `sum`; (C,)."""
        return logits_CV.gather(1, target_C[:, None]).squeeze(1)

    def add_label_(self, gradient_CV: Tensor, target_C: Tensor, value: float) -> None:
        """Add a number to each row's entry at its target."""
        ids_C1 = target_C[:, None]
        gradient_CV.scatter_add_(1, ids_C1, gradient_CV.new_full(ids_C1.shape, value))


WHOLE = Vocabulary()


@dataclass(frozen=True)
class Part(Vocabulary):
    """The ids [start, stop) are here, the others on the ranks of the group; maybe none is here.

    A call takes one collective, of a few numbers a row.
    """

    group: "dist.ProcessGroup | None"
    start: int
    stop: int
    size: int
    """Ids of all ranks."""
    most: int
    """Ids of the rank that has the most."""

    def top(self, *logits_CV: Tensor) -> tuple[Tensor, ...]:
        """See `Vocabulary`."""
        if self.stop > self.start:
            tops_C1 = super().top(*logits_CV)
        else:
            tops_C1 = tuple(x.new_full((len(x), 1), -torch.inf) for x in logits_CV)
        return self._reduce(tops_C1, dist.ReduceOp.MAX)

    def sum(self, *partial: Tensor) -> tuple[Tensor, ...]:
        """See `Vocabulary`."""
        return self._reduce(partial, dist.ReduceOp.SUM)

    def label(self, logits_CV: Tensor, target_C: Tensor) -> Tensor:
        """See `Vocabulary`; 0 where the target is another rank's, NaN where it is nobody's."""
        label_C = logits_CV.new_zeros(len(logits_CV))
        if self.stop > self.start:
            ids_C, here_C = self._locate(target_C)
            label_C = super().label(logits_CV, ids_C).masked_fill(~here_C, 0)
        return label_C.masked_fill((target_C < 0) | (target_C >= self.size), torch.nan)

    def add_label_(self, gradient_CV: Tensor, target_C: Tensor, value: float) -> None:
        """See `Vocabulary`."""
        if self.stop > self.start:
            ids_C, here_C = self._locate(target_C)
            values_C = torch.where(here_C, gradient_CV.new_full((), value), 0)
            gradient_CV.scatter_add_(1, ids_C[:, None], values_C[:, None])

    def _locate(self, target_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of each target, any where it is not here, and whether it is."""
        here_C = (target_C >= self.start) & (target_C < self.stop)
        return torch.where(here_C, target_C - self.start, 0), here_C

    def _reduce(
        self, partial: tuple[Tensor, ...], how: "dist.ReduceOp.RedOpType"
    ) -> tuple[Tensor, ...]:
        stacked = torch.stack(partial)
        dist.all_reduce(stacked, how, self.group)
        return stacked.unbind()

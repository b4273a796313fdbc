"""The share of the trained weights that an update moves.

An update that is small beside a weight is rounded away: with fp32 masters hardly any is, weights
that were kept in bf16 alone would mostly stand still, and training would seem to run. What has no
gradient does not move either, such as A of fresh adapters in the first step.

Of what a rank holds of a parameter at most ``2 * SAMPLE`` entries are looked at, evenly spaced, and
all where there are no more; each stands for as many as it was drawn from. Copies of these are all
the memory it takes. docs/guards.md says what it costs in time.

Legend: E entries that are looked at.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bidistill.distributed import held
from bidistill.world import World

SAMPLE = 1 << 12
"""Entries of a parameter; the standard error of its share is then at most 0.008, of all less."""


class Watch:
    """Looks at weights now, and again after the update.

    Args:
        parameters: those that train, whole or shared out, all on one device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Remember the entries."""
        parts = [held(parameter.detach()).flatten() for parameter in parameters]
        self._size = sum(len(part) for part in parts)
        self._entries = [part[:: stride(len(part))] for part in parts]  # views: they will change
        stands_for = [len(p) / max(len(e), 1) for p, e in zip(parts, self._entries, strict=True)]
        self._weight_E = np.repeat(stands_for, [len(entries) for entries in self._entries])
        self._before_E = torch.cat(self._entries)

    def share(self, world: World) -> float:
        """The share that differs by now, over all ranks, each of which must ask.

        Where several ranks hold a copy of a part, each counts its own, and so does what they hold:
        all parameters have as many copies.
        """
        changed_E = torch.cat(self._entries) != self._before_E
        weight_E = torch.from_numpy(self._weight_E).to(changed_E.device)
        moved: Tensor = (changed_E * weight_E).sum()
        changed, size = world.sum([moved.item(), self._size]).tolist()
        return changed / max(size, 1)


def stride(size: int) -> int:
    """Steps from entry to entry; odd, so as not to stay in some columns of a matrix.

    Example:
        >>> stride(100), stride(8192), stride(1 << 20)
        (1, 3, 257)
    """
    return max(1, size // SAMPLE) | 1

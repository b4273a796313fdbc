"""Stored teachers: made from a chunk of logits, and read with absent entries made harmless.

Shapes: C rows, P outcomes, K ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import Logits, TopK


class Stored(NamedTuple):
    """Ids and values of a teacher; an absent entry has the id of another one, its source."""

    ids_CK: Tensor
    values_CK: Tensor
    absent_CK: Tensor
    source_CK: Tensor  # place of the entry that this one copies; its own if it exists

    @classmethod
    def read(cls, teacher: TopK) -> "Stored":
        """Let the absent entries (-inf) copy the row's best one.

        Then reading or masking their id does nothing new, a gradient of 0 may be added there, and
        values to be written are those of `source_CK`: writes to the same id agree. A row of absent
        entries alone copies one of them, with id 0.
        """
        absent_CK = teacher.values.isneginf()
        best_C1 = teacher.values.argmax(-1, keepdim=True)
        place_K = torch.arange(absent_CK.shape[1], device=absent_CK.device)
        source_CK = torch.where(absent_CK, best_C1, place_K)
        ids_CK = teacher.ids.masked_fill(absent_CK, 0).gather(1, source_CK)
        return cls(ids_CK, teacher.values, absent_CK, source_CK)

    @classmethod
    def whole(cls, ids_CK: Tensor, values_CK: Tensor) -> "Stored":
        """Take entries that all exist."""
        place_CK = torch.arange(ids_CK.shape[1], device=ids_CK.device).expand_as(ids_CK)
        return cls(ids_CK, values_CK, torch.zeros_like(ids_CK, dtype=torch.bool), place_CK)


def top_log_probs(logits: Logits, k: int) -> TopK:
    """Return the k best ids of a chunk and their log-probabilities; the logits are used up.

    The other ids' share is summed apart and all are normalised together, so that 1 minus the sum of
    the stored probabilities is that share to a few 1e-7. A log-sum-exp of all ids would be off by
    the rounding of a number of its size, 1e-6 at 20, and every probability with it.
    """
    ids_CK = logits.top(k)
    best_CK = logits.at(ids_CK)
    logits.mask_(ids_CK)
    outcomes_CP = torch.cat([best_CK, logits.log_sum_exp()[:, None]], dim=1)
    return TopK(ids_CK, outcomes_CP.log_softmax(-1)[:, :-1])

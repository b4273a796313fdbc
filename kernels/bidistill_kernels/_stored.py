"""A chunk of a stored teacher with its absent entries made harmless. Shapes: C rows, K ids."""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import TopK


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

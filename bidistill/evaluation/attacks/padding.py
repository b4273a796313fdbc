"""Texts of unequal length in one batch, for a forward pass without a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, shape (B, L); the mask is made from the lengths alone.

    On the right, where no token can see it, padding changes nothing whatever a model makes of it.

    Example:
        >>> right_padded([[5, 6], [7]], torch.device("cpu"))[1].tolist()
        [[1, 1], [1, 0]]
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)

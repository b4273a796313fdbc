"""Texts of unequal length in one batch.

The mask is made from the lengths alone; the id of padding is 0 and never looked at.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, shape (B, L); all texts end in the last column.

    Example:
        >>> left_padded([[5, 6], [7]], torch.device("cpu"))[1].tolist()
        [[1, 1], [0, 1]]
    """
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        mask[index, length - len(row) :] = 1
    return ids.to(device), mask.to(device)


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, shape (B, L); all texts begin in the first column.

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

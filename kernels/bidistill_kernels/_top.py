"""The k best ids of each row of logits, in plain PyTorch."""

from jaxtyping import Float, Integer
from torch import Tensor


def top_ids(logits: Float[Tensor, "N V"], k: int) -> Integer[Tensor, "N K"]:
    """Return the ids of the K = min(k, V) largest logits of each row, lowest id first on ties.

    Example:
        >>> import torch
        >>> top_ids(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2)
        tensor([[0, 2]])
    """
    k = min(k, logits.shape[-1])
    values, ids = logits.topk(k)
    # topk may keep any of the ids that tie for the last place, and in any order: such rows, rare
    # in fp32, are sorted
    tied = (logits >= values[:, -1:]).sum(-1) > k
    tied = (tied | (values[:, 1:] == values[:, :-1]).any(-1)).nonzero().squeeze(1)
    ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids

"""A padded batch of sequences, and the positions of it that predict an answer.

Rows are picked by positions of a fixed shape, not by a mask, whose number of rows would depend on
the data: a compiler would have to break its graph there, and an accelerator to wait for the number.
So there are as many rows as the longest answer could have; those past the end of an answer have the
target ``IGNORED``, and the losses leave them out before anything is projected.

Legend: B sequences, T tokens of the longest, A rows of each, H hidden width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

IGNORED = -100
"""Target of positions that predict no answer token."""


def shifted(labels: Integer[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """Labels where they are predicted, one position before they stand.

    Example:
        >>> shifted(torch.tensor([[-100, -100, 7, 8]])).tolist()
        [[-100, 7, 8, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def positions_of(mask: Integer[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """Number of each token in its sequence, from 0, on whichever side the padding is.

    Example:
        >>> positions_of(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
        [[0, 0, 0, 1], [0, 1, 2, 2]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class Padded:
    """What a model reads, and where it predicts an answer.

    Args:
        inputs: keyword arguments of the model without its head, each of B sequences.
        target: the token that each position predicts, `IGNORED` where it counts for nothing.
            Shape (B, T).
        width: rows of each sequence, at most T and at least the number of tokens of any answer.
    """

    def __init__(
        self, inputs: dict[str, Tensor], target: Integer[Tensor, "B T"], width: int
    ) -> None:
        """Find the positions."""
        self.inputs = inputs
        # stable: tokens of an answer come first, in their order
        order_BT = (target == IGNORED).to(torch.uint8).argsort(dim=1, stable=True)
        self.positions = order_BT[:, :width]
        self.target = target.gather(1, self.positions).flatten()
        """The tokens that the rows predict, shape (B * A,)."""

    def rows(self, hidden: Float[Tensor, "B T H"]) -> Float[Tensor, "B*A H"]:
        """The hidden states that predict `target`."""
        index = self.positions[:, :, None].expand(-1, -1, hidden.shape[2])
        return hidden.gather(1, index).flatten(0, 1)

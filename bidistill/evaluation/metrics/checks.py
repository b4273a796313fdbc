"""What every metric asks of its inputs, in one wording."""

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from bidistill.errors import UserError

ROUNDING = 1e-3
"""A log-probability may exceed 0 by this much: half precision rounds ``logit - lse`` upwards."""


def numbers(values: ArrayLike, name: str) -> Float64[np.ndarray, " n"]:
    """One row of numbers in double precision: at least one, infinities allowed.

    Raises:
        UserError: there is none, one is NaN, or it is not one row.
    """
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1:
        raise UserError(f"{name}: got shape {row.shape}, expected one row; pass one item at a time")
    if not row.size:
        raise UserError(f"{name}: got none, expected at least one; leave items without them out")
    if np.isnan(row).any():
        at = int(np.isnan(row).argmax())
        raise UserError(f"{name}: got NaN at {at}, expected numbers; find out where it comes from")
    return row


def log_probs(values: ArrayLike, name: str) -> Float64[np.ndarray, " n"]:
    """One row of log-probabilities, in nats; minus infinity is probability 0.

    Raises:
        UserError: as `numbers`; or one is positive, so that they are logits or probabilities.
    """
    row = numbers(values, name)
    if row.max() > ROUNDING:
        raise UserError(
            f"{name}: got {row.max():.6g}, expected log-probabilities, at most 0; "
            "apply log_softmax to logits and log to probabilities"
        )
    return np.minimum(row, 0)


def shares(values: ArrayLike, name: str) -> Float64[np.ndarray, " n"]:
    """One row of numbers from 0 to 1.

    Raises:
        UserError: as `numbers`; or one is outside.
    """
    row = numbers(values, name)
    outside = (row < 0) | (row > 1)
    if outside.any():
        got = row[int(outside.argmax())]
        raise UserError(f"{name}: got {got:.6g}, expected 0 to 1; divide percentages by 100")
    return row

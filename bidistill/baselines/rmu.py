"""Representation misdirection (RMU): steer the hidden states of what is to be forgotten away.

forget: loss_n = mean over width of (h_n - c u)^2; keep: loss_n = the same of h_n - h0_n,
with h the rows that leave one transformer block, h0 those of the base model there, u one random
vector of length 1. As in the authors' code its entries are drawn uniformly from 0 to 1, before
it is normalised. Their alpha is the weight of the roles that are kept.

The rows are those of answer tokens; the authors take all tokens of a text.
Source: Li et al. 2024 (WMDP), arXiv:2403.03218, and centerforaisafety/wmdp.

Legend: N rows, H hidden width.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bidistill_kernels._checks import check_choice, check_number

Side = Literal["forget", "keep"]


def rmu(
    hidden: Float[Tensor, "N H"],
    base_hidden: Float[Tensor, "N H"],
    *,
    side: Side = "forget",
    layer: int = 7,
    coefficient: float = 20.0,
    seed: int = 0,
) -> Float[Tensor, " N"]:
    """Loss of each row; no unit.

    Args:
        hidden: the student's rows.
        base_hidden: the base model's, a constant.
        side: whether what is read is to be forgotten or kept.
        layer: number of the block, from 0; who calls takes its rows.
        coefficient: length c of the vector that rows are steered to.
        seed: of its direction.

    Raises:
        ValueError: an argument out of range.
    """
    check_choice("side", side, get_args(Side))
    check_number("layer", layer, 0, whole=True)
    check_number("coefficient", coefficient, 0)
    check_number("seed", seed, 0, whole=True)
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if side == "keep":
        return (hidden - base_hidden.detach().to(hidden.dtype)).square().mean(-1)
    steered = coefficient * direction(hidden.shape[1], seed)
    return (hidden - steered.to(hidden)).square().mean(-1)


def direction(width: int, seed: int) -> Float[Tensor, " H"]:
    """The random vector of length 1, the same wherever it is drawn; fp64, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    vector_H = torch.rand(width, generator=generator, dtype=torch.float64)
    return vector_H / vector_H.norm()

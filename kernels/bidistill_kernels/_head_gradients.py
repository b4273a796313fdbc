"""Gradients of head and bias from what the driver kept, once the upstream gradient is known.

Shapes: N tokens, M of them that count, V vocabulary, D width of a model, K ids of a sparse
gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels import _backends, _products
from bidistill_kernels._head import kept_rows


class Shape(NamedTuple):
    """What must be known of a head to write its gradients; not the head, which need not be kept."""

    size: list[int]  # (V, D) with all its rows, or (V,) of a bias
    dtype: torch.dtype

    def new_zeros(self, like: Tensor) -> Tensor:
        """Return zeros of this shape."""
        return like.new_zeros(self.size, dtype=self.dtype)


class Kept(NamedTuple):
    """What `lm_head.run_chunks` kept of the rows; see `LossRows`."""

    slab: Tensor
    ids_NK: Tensor
    hidden_ND: Tensor
    row_weight_N: Tensor
    vocab: int
    sparse: bool
    backend: str
    all_rows: bool


def head_gradients(
    kept: Kept, scale_N: Tensor, weight: Shape | None, bias: Shape | None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of head and bias; size 0 where None.

    `scale_N` weighs the rows that count: upstream gradient times the transform's constant factor.
    """
    hidden_MD, scale_M, slab, ids_MK = kept.hidden_ND, scale_N, kept.slab, kept.ids_NK
    rows_M = kept_rows(kept.row_weight_N, kept.all_rows)
    if rows_M is not None:
        # a row that was left out may hold anything, NaN too
        hidden_MD, scale_M = hidden_MD[rows_M], scale_M[rows_M]
        if kept.sparse:
            slab, ids_MK = slab[rows_M], ids_MK[rows_M]
    # autocast would turn fp32 products into 16-bit ones
    with torch.autocast(scale_N.device.type, enabled=False):
        if kept.sparse:
            values_MK = slab * scale_M[:, None]
            return _sparse(kept, values_MK, ids_MK, hidden_MD, weight, bias)
        return _dense(slab[: len(hidden_MD), : kept.vocab], hidden_MD, scale_M, weight, bias)


def _sparse(
    kept: Kept,
    values_MK: Tensor,
    ids_MK: Tensor,
    hidden_MD: Tensor,
    weight: Shape | None,
    bias: Shape | None,
) -> tuple[Tensor, Tensor]:
    backend = _backends.load(kept.backend)
    dw_VD, db_V = values_MK.new_empty(0), values_MK.new_empty(0)
    if weight is not None:
        dw_VD = weight.new_zeros(values_MK)
        backend.sparse_dw(values_MK, ids_MK, hidden_MD, dw_VD[: kept.vocab])
    if bias is not None:
        db_V = bias.new_zeros(values_MK)
        backend.sparse_dbias(values_MK, ids_MK, db_V[: kept.vocab])
    return dw_VD, db_V


def _dense(
    gradient_MV: Tensor,
    hidden_MD: Tensor,
    scale_M: Tensor,
    weight: Shape | None,
    bias: Shape | None,
) -> tuple[Tensor, Tensor]:
    dw_VD, db_V = scale_M.new_empty(0), scale_M.new_empty(0)
    if weight is not None:
        dw_VD = _products.weight_gradient(gradient_MV, hidden_MD, scale_M, weight.dtype)
        dw_VD = _unlimited(dw_VD, weight)
    if bias is not None:
        total_V = scale_M.new_zeros(gradient_MV.shape[1])
        _products.add_bias_gradient(gradient_MV, scale_M, total_V)
        db_V = _unlimited(total_V.to(bias.dtype), bias)
    return dw_VD, db_V


def _unlimited(gradient: Tensor, shape: Shape) -> Tensor:
    """Add zeros for ids beyond the vocabulary limit."""
    missing = shape.size[0] - len(gradient)
    if missing == 0:
        return gradient
    return torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])])

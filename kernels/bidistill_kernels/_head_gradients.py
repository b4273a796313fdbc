"""Gradients of head and bias from what the driver kept, once the upstream gradient is known.

Shapes: N tokens, M of them that count, V vocabulary, D width of a model, K ids of a sparse
gradient.
"""

import torch
from torch import Tensor

from bidistill_kernels import _backends, _products
from bidistill_kernels._head import Head, Needs, Plan, kept_rows


def head_gradients(
    student: Head,
    kept: tuple[Tensor, Tensor],
    row_weight_N: Tensor,
    upstream_N: Tensor,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of head and bias, in their dtypes, from the slab and ids that were kept.

    `row_weight_N` is that of `run_chunks`; `upstream_N` weighs the rows that count.
    """
    slab, ids_NK = kept
    hidden_MD, scale_M = student.hidden_ND, upstream_N * student.transform.factor
    kept_M = kept_rows(row_weight_N, plan.all_rows)
    if kept_M is not None:
        # a row that was left out may hold anything, NaN too
        hidden_MD, scale_M = hidden_MD[kept_M], scale_M[kept_M]
    if ids_NK.numel() == 0:
        gradient_MV = slab[: len(hidden_MD), : student.vocab]
        return _dense_head_gradients(student, gradient_MV, hidden_MD, scale_M, needs)
    backend, V = _backends.load(plan.backend), student.vocab
    ids_MK, values_MK = (x if kept_M is None else x[kept_M] for x in (ids_NK, slab))
    values_MK = values_MK * scale_M[:, None]
    dw_VD, db_V = scale_M.new_empty(0), scale_M.new_empty(0)
    if needs.weight and student.weight_VD is not None:
        dw_VD = torch.zeros_like(student.weight_VD, memory_format=torch.contiguous_format)
        backend.sparse_dw(values_MK, ids_MK, hidden_MD, dw_VD[:V])
    if needs.bias and student.bias_V is not None:
        db_V = torch.zeros_like(student.bias_V)
        backend.sparse_dbias(values_MK, ids_MK, db_V[:V])
    return dw_VD, db_V


def _dense_head_gradients(
    student: Head, gradient_MV: Tensor, hidden_MD: Tensor, scale_M: Tensor, needs: Needs
) -> tuple[Tensor, Tensor]:
    dw_VD, db_V = scale_M.new_empty(0), scale_M.new_empty(0)
    if needs.weight and student.weight_VD is not None:
        dtype = student.weight_VD.dtype
        dw_VD = _products.weight_gradient(gradient_MV, hidden_MD, scale_M, dtype)
        dw_VD = _unlimited(dw_VD, student.weight_VD)
    if needs.bias and student.bias_V is not None:
        total_V = scale_M.new_zeros(student.vocab)
        _products.add_bias_gradient(gradient_MV, scale_M, total_V)
        db_V = _unlimited(total_V.to(student.bias_V.dtype), student.bias_V)
    return dw_VD, db_V


def _unlimited(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Add zeros for ids beyond the vocabulary limit."""
    missing = len(parameter) - len(gradient)
    if missing == 0:
        return gradient
    return torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])])

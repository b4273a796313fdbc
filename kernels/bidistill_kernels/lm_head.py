"""Chunk driver: turns any row function into a loss fused with the LM head.

The logits of one chunk of tokens exist, in fp32 (fp64 for fp64 input), never N x V. Each chunk is
projected with both heads, its loss and logit gradient are computed block by block in the cache,
and the gradient is at once multiplied into dX and dW: 8NVH FLOPs, nothing recomputed. Memory and
precision are accounted for in kernels/README.md.

Shapes: N tokens, C rows of one chunk, V vocabulary, D width of a model, K ids of a sparse gradient.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import ROW_LOSSES, RowLoss, RowResult, SparseGradient
from bidistill_kernels.transform import LogitTransform

# One block's buffer of logits: with its four companions it stays in a core's share of the cache.
# Measured in kernels/README.md#traffic
BLOCK_BYTES = 1 << 20
# Rows of a 16-bit head converted at a time: a full fp32 copy of the head never exists
SLAB_ROWS = 4096


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits; weight None: they are logits."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    transform: LogitTransform

    @property
    def vocab(self) -> int:
        """Number of ids that take part."""
        V = self.hidden_ND.shape[-1] if self.weight_VD is None else self.weight_VD.shape[0]
        return min(V, self.transform.vocab_limit or V)

    def slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the head in pieces of `dtype`: one piece if it has that dtype already."""
        assert self.weight_VD is not None
        step = self.vocab if self.weight_VD.dtype == dtype else SLAB_ROWS
        for start in range(0, self.vocab, step):
            ids = slice(start, min(start + step, self.vocab))
            yield ids, self.weight_VD[ids].to(dtype)

    def project(self, rows_C: Tensor, logits_CV: Tensor) -> None:
        """Write the raw logits of the given rows."""
        if self.weight_VD is None:
            logits_CV.copy_(self.hidden_ND[:, : self.vocab][rows_C])
            return
        x_CD = self.hidden_ND[rows_C].to(logits_CV.dtype)
        for ids, weight_SD in self.slabs(logits_CV.dtype):
            torch.mm(x_CD, weight_SD.T, out=logits_CV[:, ids])
        if self.bias_V is not None:
            logits_CV.add_(self.bias_V[: self.vocab].to(logits_CV.dtype))


class Needs(NamedTuple):
    """Which gradients the caller needs."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients:
    """Gradients of the weighted sum, in the dtype of the computation; size 0 where not needed."""

    def __init__(self, head: Head, needs: Needs, dtype: torch.dtype) -> None:
        """Allocate zeros: ignored rows and ids nobody touches keep them."""

        def zeros(like: Tensor | None, needed: bool) -> Tensor:
            shape = like.shape if needed and like is not None else (0,)
            return head.hidden_ND.new_zeros(shape, dtype=dtype)

        self.head, self.needs, self.dtype = head, needs, dtype
        self.hidden_ND = zeros(head.hidden_ND, needs.hidden)
        self.weight_VD = zeros(head.weight_VD, needs.weight)
        self.bias_V = zeros(head.bias_V, needs.bias)

    def add_dense(self, rows_C: Tensor, scale_C: Tensor, gradient_CV: Tensor) -> None:
        """Add a chunk. Weights scale the narrow (C, D) operands, never the logit gradient."""
        V = self.head.vocab
        scale_C1 = scale_C[:, None]
        if self.head.weight_VD is None:
            self.hidden_ND[rows_C, :V] = gradient_CV.mul_(scale_C1)
            return
        if self.needs.hidden:
            dx_CD = self.hidden_ND.new_zeros(len(rows_C), self.hidden_ND.shape[1])
            for ids, weight_SD in self.head.slabs(self.dtype):
                dx_CD.addmm_(gradient_CV[:, ids], weight_SD)
            self.hidden_ND[rows_C] = dx_CD.mul_(scale_C1)
        if self.needs.weight:
            x_CD = self.head.hidden_ND[rows_C].to(self.dtype).mul_(scale_C1)
            self.weight_VD[:V].addmm_(gradient_CV.T, x_CD)
        if self.needs.bias:
            self.bias_V[:V].addmv_(gradient_CV.T, scale_C)

    def add_sparse(self, rows_C: Tensor, scale_C: Tensor, gradient: SparseGradient) -> None:
        """Add a block of which K ids a row have a gradient: gathers of head rows, no (C, V)."""
        ids_CK, values_CK = gradient.ids_CK, gradient.values_CK * scale_C[:, None]
        if self.head.weight_VD is None:
            dlogits_CV = values_CK.new_zeros(len(rows_C), self.hidden_ND.shape[1])
            self.hidden_ND[rows_C] = dlogits_CV.scatter_add_(1, ids_CK, values_CK)
            return
        if self.needs.hidden:
            weight_CKD = self.head.weight_VD[ids_CK].to(self.dtype)
            self.hidden_ND[rows_C] = torch.bmm(values_CK[:, None], weight_CKD).squeeze(1)
        if self.needs.weight:
            x_CD = self.head.hidden_ND[rows_C].to(self.dtype)
            outer_CKD = values_CK[..., None] * x_CD[:, None]
            self.weight_VD.index_add_(0, ids_CK.flatten(), outer_CKD.flatten(0, 1))
        if self.needs.bias:
            self.bias_V.index_add_(0, ids_CK.flatten(), values_CK.flatten())


class LossRows(NamedTuple):
    """Per-token results of the driver; 0 at rows of weight 0."""

    loss_N: Tensor
    stats_SN: Tensor
    gradients: Gradients


def run_chunks(
    student: Head,
    teacher: Head | None,
    target_N: Tensor | None,
    row_weight_N: Tensor,
    loss: str,
    params: Sequence[float],
    needs: Needs,
    chunk_bytes: int,
) -> LossRows:
    """Loss of every row of non-zero weight, and the gradients of their weighted sum.

    `row_weight_N` also sets the dtype of the computation. Rows of weight 0 are left out before
    anything is projected. At most `chunk_bytes` of logits exist at a time (or one row of them).
    """
    row_loss, dtype = ROW_LOSSES[loss], row_weight_N.dtype
    heads = [head for head in (student, teacher) if head is not None]
    kept_M = row_weight_N.nonzero().squeeze(1)
    most_rows = max(1, chunk_bytes // (len(heads) * student.vocab * dtype.itemsize))
    # of even size: a short last chunk would read the whole head for a few rows
    chunks = kept_M.tensor_split(max(1, math.ceil(len(kept_M) / most_rows)))
    buffer_HCV = row_weight_N.new_empty(len(heads), len(chunks[0]), student.vocab)
    out = LossRows(
        row_weight_N.new_zeros(len(row_weight_N)),
        row_weight_N.new_zeros(len(row_loss.stats), len(row_weight_N)),
        Gradients(student, needs, dtype),
    )
    # autocast would turn the fp32 projections back into 16-bit ones
    with torch.autocast(row_weight_N.device.type, enabled=False):
        for rows_C in chunks:
            logits_HCV = buffer_HCV[:, : len(rows_C)]
            for head, logits_CV in zip(heads, logits_HCV, strict=True):
                head.project(rows_C, logits_CV)
            target_C = None if target_N is None else target_N[rows_C]
            scale_C = row_weight_N[rows_C] * student.transform.factor
            _run_blocks(row_loss, params, heads, logits_HCV, target_C, rows_C, scale_C, out)
    return out


def _run_blocks(
    row_loss: RowLoss,
    params: Sequence[float],
    heads: Sequence[Head],
    logits_HCV: Tensor,
    target_C: Tensor | None,
    rows_C: Tensor,
    scale_C: Tensor,
    out: LossRows,
) -> None:
    """Run the row function over a projected chunk and add its results to `out`.

    A dense gradient takes the place of the student's logits, block by block, so that the two
    gradient products see the whole chunk.
    """
    step = max(1, BLOCK_BYTES // max(1, logits_HCV[0, :1].nbytes))
    need_gradient, dense = any(out.gradients.needs), False
    for start in range(0, len(rows_C), step):
        block = slice(start, start + step)
        target_B = None if target_C is None else target_C[block]
        result = _run_block(row_loss, params, heads, logits_HCV[:, block], target_B, need_gradient)
        out.loss_N[rows_C[block]] = result.loss_C
        for stat_N, stat_B in zip(out.stats_SN, result.stats, strict=True):
            stat_N[rows_C[block]] = stat_B
        if isinstance(result.gradient, SparseGradient):
            out.gradients.add_sparse(rows_C[block], scale_C[block], result.gradient)
        elif result.gradient is not None:
            logits_HCV[0, block].copy_(result.gradient)
            dense = True
    if dense:
        out.gradients.add_dense(rows_C, scale_C, logits_HCV[0])


def _run_block(
    row_loss: RowLoss,
    params: Sequence[float],
    heads: Sequence[Head],
    logits_HBV: Tensor,
    target_B: Tensor | None,
    need_gradient: bool,
) -> RowResult:
    """Transform one block of raw logits, run the row function, apply the soft-cap's slope."""
    for head, logits_BV in zip(heads, logits_HBV, strict=True):
        head.transform.apply_(logits_BV)
    student_BV, *teacher_BV = logits_HBV.unbind()
    capped = need_gradient and heads[0].transform.softcap is not None
    slope_BV = heads[0].transform.slope(student_BV) if capped else None
    teacher = teacher_BV[0] if teacher_BV else None
    result = row_loss.rows(student_BV, teacher, target_B, params, need_gradient=need_gradient)
    gradient = result.gradient
    if slope_BV is None or gradient is None:
        return result
    if isinstance(gradient, SparseGradient):
        sloped = gradient.values_CK * slope_BV.gather(1, gradient.ids_CK)
        return result._replace(gradient=gradient._replace(values_CK=sloped))
    return result._replace(gradient=gradient.mul_(slope_BV))

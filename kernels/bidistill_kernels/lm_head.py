"""Chunk driver: turns any row function into a loss fused with the LM head.

The logits of one chunk of tokens exist, in fp32 (fp64 for fp64 input), never N x V. Each chunk is
projected with both heads, a back-end computes its loss and logit gradient, and nothing is
recomputed. Where the gradient of the logits goes, from small to large:

* sparse losses: K ids and values a token, which gradients gather head rows by;
* in place over the chunk's logits, and at once into dX and dW: frozen heads, CPU;
* a slab of several chunks, so that the large sum dW is moved once a slab: 16-bit heads on
  accelerators;
* a slab of all tokens, kept until the upstream gradient is known: while it is smaller than that
  sum would be.

Memory and precision are accounted for in kernels/README.md. Shapes: N tokens, M of them that count,
C rows of a chunk, B of a block, V vocabulary, D width of a model, K ids of a sparse gradient, H
heads (one or two).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from bidistill_kernels import _backends, _products
from bidistill_kernels._rows import (
    ROW_LOSSES,
    Chunk,
    Logits,
    RowResult,
    SparseGradient,
    TopK,
)
from bidistill_kernels._torch_rows import Gathered
from bidistill_kernels.transform import LogitTransform


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

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias of the ids that take part."""
        return None if self.bias_V is None else self.bias_V[: self.vocab].to(dtype)

    def weight(self) -> Tensor:
        """Return the head rows of the ids that take part."""
        assert self.weight_VD is not None
        return self.weight_VD[: self.vocab]

    def project(self, rows: "Rows", out_CV: Tensor) -> None:
        """Write the products of the given rows with the head, without the bias."""
        hidden_CD = self.hidden_ND[rows]
        if self.weight_VD is None:
            out_CV.copy_(hidden_CD[:, : self.vocab])
        else:
            _products.project(hidden_CD, self.weight(), out_CV)


class Needs(NamedTuple):
    """Which gradients the caller needs."""

    hidden: bool
    weight: bool
    bias: bool


class Plan(NamedTuple):
    """How the driver works, as far as the caller decides it."""

    backend: str
    chunk_bytes: int
    all_rows: bool
    """No row has weight 0, and nobody needs to look: no synchronisation with the device."""
    weigh: bool
    """The sums dW and dbias are wanted, over the rows' weights; else per-row gradients, of which
    those of the logits are kept."""


class LossRows(NamedTuple):
    """Per-token results of the driver; 0 at rows of weight 0, size 0 where not asked for."""

    loss_N: Tensor
    stats_SN: Tensor
    hidden_ND: Tensor
    """Gradient of each row's loss, unweighted, in the dtype of the computation."""
    weight_VD: Tensor
    """Gradient of the weighted sum of the losses, if `Plan.weigh`."""
    bias_V: Tensor
    slab_NV: Tensor
    """The kept gradient of raw logits: of a dense loss the first M rows and V columns, of a sparse
    one the values (N, K). Unweighted, without the constant factor of the transform."""
    ids_NK: Tensor


Rows: TypeAlias = "slice | Tensor"  # a range of rows, or the listed ones


def padded(V: int) -> int:
    """Return the row stride of logits: rows start at multiples of 32 bytes in every dtype."""
    return -(-V // 16) * 16


def gradient_dtype(student: Head, backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits' gradient: the head's, for products of 16-bit operands."""
    weight = student.weight_VD
    return dtype if backend != "triton" or weight is None else weight.dtype


def keeps_slab(
    hidden_ND: Tensor, weight_VD: Tensor | None, loss: str, needs: Needs, backend: str
) -> bool:
    """Tell whether the gradient of all logits is kept until the upstream gradient is known.

    It is while N rows of it take no more memory than one slab and the fp32 sum of dW would.
    """
    if not (needs.weight or needs.bias):
        return False
    if ROW_LOSSES[loss].width is not None:
        return True
    slab_bytes = _backends.sizes(backend, hidden_ND.device.type).slab_bytes
    if slab_bytes == 0 or weight_VD is None:
        return False
    V, D = weight_VD.shape
    slab = hidden_ND.shape[0] * padded(V) * weight_VD.dtype.itemsize
    return slab <= slab_bytes + 4 * V * D


def slab_shape(
    student: Head, teacher: Head | TopK | None, loss: str, params: Sequence[float]
) -> tuple[int, int]:
    """Return the shape of `LossRows.slab_NV` where one is kept."""
    # not len(), which fixes a symbolic size
    N, width = student.hidden_ND.shape[0], ROW_LOSSES[loss].width
    if width is None:
        return N, padded(student.vocab)
    stored = teacher.ids.shape[1] if isinstance(teacher, TopK) else 0
    return N, width(params, student.vocab, stored)


def run_chunks(
    student: Head,
    teacher: Head | TopK | None,
    target_N: Tensor | None,
    row_weight_N: Tensor,
    loss: str,
    params: Sequence[float],
    needs: Needs,
    plan: Plan,
) -> LossRows:
    """Loss of every row of non-zero weight, and its gradients.

    `row_weight_N` also sets the dtype of the computation. Rows of weight 0 are left out before
    anything is projected. At most `chunk_bytes` of logits exist at a time (or one row of them).
    """
    job = _Job(student, teacher, target_N, row_weight_N, loss, params, needs, plan)
    # autocast would turn the fp32 projections back into 16-bit ones
    with torch.autocast(row_weight_N.device.type, enabled=False):
        job.run()
    return job.out


def logit_chunks(
    head: Head, dtype: torch.dtype, backend: str, chunk_bytes: int
) -> Iterator[tuple[slice, Logits]]:
    """Yield one model's logits a chunk at a time, in memory that the next chunk takes."""
    N, V, module = len(head.hidden_ND), head.vocab, _backends.load(backend)
    C = max(1, min(N, chunk_bytes // (padded(V) * dtype.itemsize)))
    buffer_CV = head.hidden_ND.new_empty(C, padded(V), dtype=dtype)
    for start in range(0, N, C):
        rows = slice(start, min(start + C, N))
        logits_CV = buffer_CV[: rows.stop - start, :V]
        head.project(rows, logits_CV)
        yield rows, module.logits(logits_CV, head.bias(dtype), head.transform)


def kept_rows(row_weight_N: Tensor, all_rows: bool) -> Tensor | None:
    """Return the rows that count, None for all; one synchronisation with the device, or none."""
    return None if all_rows else row_weight_N.nonzero().squeeze(1)


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


class _Job:
    """One call of the driver: inputs, buffers, results."""

    def __init__(
        self,
        student: Head,
        teacher: Head | TopK | None,
        target_N: Tensor | None,
        row_weight_N: Tensor,
        loss: str,
        params: Sequence[float],
        needs: Needs,
        plan: Plan,
    ) -> None:
        weight = student.weight_VD
        if ROW_LOSSES[loss].width is not None and weight is not None and weight.stride(1) != 1:
            # head rows are gathered, each in one piece: a transposed head is copied, once a call
            student = student._replace(weight_VD=weight.contiguous())
        self.student, self.teacher, self.target_N = student, teacher, target_N
        self.row_weight_N, self.params, self.needs, self.plan = row_weight_N, params, needs, plan
        self.dtype, self.loss = row_weight_N.dtype, ROW_LOSSES[loss]
        self.function = _backends.row_function(loss, plan.backend)
        self.backend = _backends.load(plan.backend)
        self.sizes = _backends.sizes(plan.backend, row_weight_N.device.type)
        self.heads = [head for head in (student, teacher) if isinstance(head, Head)]
        self.sparse = self.loss.width is not None
        self.sums = plan.weigh and (needs.weight or needs.bias)
        assert not (self.sums and self.sparse), "sparse gradients are kept, not summed"
        keeps = keeps_slab(*student[:2], loss, needs, plan.backend)
        self.keeps = not plan.weigh and keeps
        self.gradient_dtype = gradient_dtype(student, plan.backend, self.dtype)
        self.kept_M = kept_rows(row_weight_N, plan.all_rows)
        self.M = len(row_weight_N) if self.kept_M is None else len(self.kept_M)
        self.out = self._results(slab_shape(student, teacher, loss, params))

    def _results(self, slab_shape: tuple[int, int]) -> LossRows:
        """Allocate zeros: rows left out and ids nobody touches keep them."""
        new, N, student = self.row_weight_N.new_zeros, len(self.row_weight_N), self.student

        def like(parameter: Tensor | None, wanted: bool) -> Tensor:
            return new(parameter.shape if wanted and parameter is not None else 0)

        slab, ids = new(0), new(0, dtype=torch.int64)
        if self.keeps and self.sparse:
            slab, ids = new(slab_shape), new(slab_shape, dtype=torch.int64)
        elif self.keeps:
            # only rows that were written are read
            slab = self.row_weight_N.new_empty(slab_shape, dtype=self.gradient_dtype)
        return LossRows(
            new(N),
            new(len(self.loss.stats), N),
            like(student.hidden_ND, self.needs.hidden),
            like(student.weight_VD, self.sums and self.needs.weight),
            like(student.bias_V, self.sums and self.needs.bias),
            slab,
            ids,
        )

    def rows(self, start: int, stop: int) -> Rows:
        """Return a range of the rows that count."""
        return slice(start, stop) if self.kept_M is None else self.kept_M[start:stop]

    def run(self) -> None:
        """Go through the slabs, and the chunks of each."""
        width = padded(self.student.vocab) * len(self.heads)
        if self.loss.gathers and isinstance(self.teacher, TopK):
            width = self.teacher.ids.shape[1]
        most = max(1, self.plan.chunk_bytes // (width * self.dtype.itemsize))
        # of even size: a short last chunk would read the whole head for a few rows
        C = max(1, -(-self.M // max(1, -(-self.M // most))))
        buffer = self.row_weight_N.new_empty(0 if self.loss.gathers else C * width)
        G, slab_GV = self._slab(C)
        for first in range(0, self.M, G):
            last = min(first + G, self.M)
            parts = -(-(last - first) // C)
            bounds = [first + (last - first) * i // parts for i in range(parts + 1)]
            for start, stop in pairwise(bounds):
                place_CV = None if slab_GV is None else slab_GV[start - first : stop - first]
                self._run_chunk(start, stop, buffer, place_CV)
            if slab_GV is not None:
                self._add_dense(self.rows(first, last), slab_GV[: last - first])

    def _slab(self, C: int) -> tuple[int, Tensor | None]:
        """Return the rows of a slab and its memory; None: gradients go over their logits."""
        if self.keeps and not self.sparse:
            return max(1, self.M), self.out.slab_NV
        row_bytes = padded(self.student.vocab) * self.gradient_dtype.itemsize
        chunks = self.sizes.slab_bytes // (C * row_bytes)
        if not self.sums or chunks < 2 or self.student.weight_VD is None:
            return C, None
        G = min(chunks * C, max(1, self.M))
        return G, self.row_weight_N.new_empty(
            G, padded(self.student.vocab), dtype=self.gradient_dtype
        )

    def _run_chunk(self, start: int, stop: int, buffer: Tensor, place_CV: Tensor | None) -> None:
        """Project a chunk, run the row function over its blocks, use an in-place gradient."""
        rows, C, V = self.rows(start, stop), stop - start, self.student.vocab
        logits_HCV = buffer[: len(self.heads) * C * padded(V)].view(-1, C, padded(V))[..., :V]
        if not self.loss.gathers:
            self._project(rows, logits_HCV)
        in_place = any(self.needs) and not self.sparse and place_CV is None
        if in_place:
            # a 16-bit gradient begins where its row of logits does
            place_CV = logits_HCV[0].view(self.gradient_dtype)
        B = C if self.loss.gathers else max(1, self.sizes.block_bytes // (V * self.dtype.itemsize))
        for at in range(0, C, B):
            block = slice(at, min(at + B, C))
            where = self.rows(start + at, start + block.stop)
            chunk = Chunk(
                *self._sides(where, logits_HCV[:, block]),
                None if self.target_N is None else self.target_N[where].long(),
                None if place_CV is None else place_CV[block, :V],
                any(self.needs),
            )
            self._write(where, self.function(chunk, self.params))
        if in_place and place_CV is not None:
            self._add_dense(rows, place_CV)

    def _project(self, rows: Rows, logits_HCV: Tensor) -> None:
        """Write the raw logits of both models, by one product if they share the head."""
        if len(self.heads) == 2 and _same_weight(*self.heads):
            hidden_HCD = torch.cat([head.hidden_ND[rows] for head in self.heads])
            _products.project(hidden_HCD, self.student.weight(), logits_HCV.flatten(0, 1))
            return
        for head, logits_CV in zip(self.heads, logits_HCV, strict=True):
            head.project(rows, logits_CV)

    def _sides(self, rows: Rows, logits_HBV: Tensor) -> tuple[Logits, Logits | TopK | None]:
        """Return what the row function sees of student and teacher."""
        teacher, student = self.teacher, self.student
        stored = None
        if isinstance(teacher, TopK):
            stored = TopK(teacher.ids[rows], teacher.values[rows].to(self.dtype))
        if self.loss.gathers:
            dot, x_CD = self.backend.gather_dot, student.hidden_ND[rows]
            operands = x_CD, student.weight_VD, student.bias(self.dtype), student.transform
            return cast(Logits, Gathered(dot, *operands)), stored
        pupil, *tutor = (
            self.backend.logits(logits_BV, head.bias(self.dtype), head.transform)
            for head, logits_BV in zip(self.heads, logits_HBV, strict=True)
        )
        return pupil, tutor[0] if tutor else stored

    def _write(self, rows: Rows, result: RowResult) -> None:
        """Put the results of some rows in their place."""
        self.out.loss_N[rows] = result.loss_C
        for stat_N, stat_C in zip(self.out.stats_SN, result.stats, strict=True):
            stat_N[rows] = stat_C
        if result.sparse is not None:
            self._add_sparse(rows, result.sparse)

    def _add_dense(self, rows: Rows, gradient_CV: Tensor) -> None:
        """Multiply a finished gradient of logits into dX, and into the sums."""
        student, factor = self.student, self.student.transform.factor
        gradient_CV = gradient_CV[:, : student.vocab]
        if student.weight_VD is None:
            self.out.hidden_ND[rows, : student.vocab] = gradient_CV * factor
            return
        if self.needs.hidden:
            dx_CD = _products.hidden_gradient(gradient_CV, student.weight(), self.dtype)
            self.out.hidden_ND[rows] = dx_CD.mul_(factor)
        scale_C = self.row_weight_N[rows] * factor
        if self.sums and self.needs.weight:
            operands = gradient_CV, student.hidden_ND[rows], scale_C
            _products.add_weight_gradient(*operands, self.out.weight_VD[: student.vocab])
        if self.sums and self.needs.bias:
            _products.add_bias_gradient(gradient_CV, scale_C, self.out.bias_V[: student.vocab])

    def _add_sparse(self, rows: Rows, sparse: SparseGradient) -> None:
        """Multiply the sparse gradient of some rows' logits into dX, and keep it for the head."""
        student, factor = self.student, self.student.transform.factor
        ids_CK, values_CK = sparse
        if student.weight_VD is None:
            dlogits_CV = values_CK.new_zeros(len(ids_CK), student.hidden_ND.shape[1])
            self.out.hidden_ND[rows] = dlogits_CV.scatter_add_(1, ids_CK, values_CK * factor)
        elif self.needs.hidden:
            dx_CD = values_CK.new_empty(len(ids_CK), student.hidden_ND.shape[1])
            self.backend.sparse_dx(values_CK * factor, ids_CK, student.weight(), dx_CD)
            self.out.hidden_ND[rows] = dx_CD
        if self.keeps:
            self.out.slab_NV[rows], self.out.ids_NK[rows] = values_CK, ids_CK


def _same_weight(one: Head, other: Head) -> bool:
    """Tell whether both heads read the same memory; two tensors may."""
    a, b = one.weight_VD, other.weight_VD
    if a is None or b is None or one.hidden_ND.dtype != other.hidden_ND.dtype:
        return False
    return (a.data_ptr(), a.stride(), a.dtype, one.vocab) == (
        *(b.data_ptr(), b.stride(), b.dtype, other.vocab),
    )

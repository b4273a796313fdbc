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
from typing import cast

import torch
from torch import Tensor

from bidistill_kernels import _backends, _products
from bidistill_kernels._head import (
    Head,
    LossRows,
    Needs,
    Plan,
    Rows,
    chunk_width,
    gradient_dtype,
    keeps_slab,
    kept_rows,
    padded,
    slab_shape,
)
from bidistill_kernels._rows import (
    ROW_LOSSES,
    Chunk,
    Logits,
    RowResult,
    SparseGradient,
    TopK,
)
from bidistill_kernels._stored import top_log_probs
from bidistill_kernels._torch_rows import Gathered
from bidistill_kernels._vocabulary import WHOLE


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


def _logit_chunks(
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


def best_ids(head: Head, k: int, dtype: torch.dtype, backend: str, chunk_bytes: int) -> TopK:
    """Return the k best ids of each row and their log-probabilities, (N, k)."""
    N = len(head.hidden_ND)
    best = TopK(
        head.hidden_ND.new_empty(N, k, dtype=torch.int64),
        head.hidden_ND.new_empty(N, k, dtype=dtype),
    )
    with torch.autocast(head.hidden_ND.device.type, enabled=False):
        for rows, logits in _logit_chunks(head, dtype, backend, chunk_bytes):
            best.ids[rows], best.values[rows] = top_log_probs(logits, k)
    return best


def _chunk_rows(M: int, most: int) -> int:
    """Return how many of M rows a chunk has at most, so that all can be of about that size.

    In eights where that many fit: by 205 rows dW takes a CPU 1.1 times as long as by 208
    (bench/cpu_products.py).
    """
    unit = 8 if most >= 8 else 1
    most -= most % unit
    units = -(-M // unit)
    return unit * max(1, -(-units // max(1, -(-M // most))))


def _bounds(M: int, C: int) -> list[int]:
    """Cut M rows into chunks of at most C and of even size, in eights where C is one.

    A short last chunk would read the whole head for a few rows.
    """
    unit, parts = 8 if C % 8 == 0 else 1, -(-M // C)
    units = -(-M // unit)
    return [*(unit * (units * i // parts) for i in range(parts)), M]


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
        self.gradient_dtype = gradient_dtype(student, plan.backend, self.dtype, plan.vocabulary)
        self.kept_M = kept_rows(row_weight_N, plan.all_rows)
        self.M = len(row_weight_N) if self.kept_M is None else len(self.kept_M)
        self.out = self._results(slab_shape(student, teacher, loss, params))

    def _results(self, slab_shape: tuple[int, int]) -> LossRows:
        """Allocate zeros, which rows left out keep, and ids that nobody touches."""
        new, N, student = self.row_weight_N.new_zeros, len(self.row_weight_N), self.student

        def like(parameter: Tensor | None, wanted: bool) -> Tensor:
            return new(parameter.shape if wanted and parameter is not None else 0)

        slab, ids = new(0), new(0, dtype=torch.int64)
        if self.keeps and self.sparse:
            slab, ids = new(slab_shape), new(slab_shape, dtype=torch.int64)
        elif self.keeps:
            slab = self.row_weight_N.new_empty(slab_shape, dtype=self.gradient_dtype)
            # nobody reads these, but an output of an operation is equal in two runs
            slab[self.M :], slab[:, student.vocab :] = 0, 0
        return LossRows(
            new(N),
            new(len(self.loss.stats), N),
            like(student.hidden_ND, self.needs.hidden),
            self._no_sum(),
            like(student.bias_V, self.sums and self.needs.bias),
            slab,
            ids,
        )

    def _no_sum(self) -> Tensor:
        """Allocate the sum dW; the first product overwrites it, if there is one."""
        weight, V = self.student.weight_VD, self.student.vocab
        if not (self.sums and self.needs.weight) or weight is None:
            return self.row_weight_N.new_empty(0)
        dw_VD = self.row_weight_N.new_empty(weight.shape)
        dw_VD[V if self.M else 0 :] = 0
        return dw_VD

    def rows(self, start: int, stop: int) -> Rows:
        """Return a range of the rows that count."""
        return slice(start, stop) if self.kept_M is None else self.kept_M[start:stop]

    def run(self) -> None:
        """Go through the slabs, and the chunks of each."""
        width = chunk_width(len(self.heads), self.student.vocab, self.plan.vocabulary)
        if self.loss.gathers and isinstance(self.teacher, TopK):
            width = self.teacher.ids.shape[1]
        C = _chunk_rows(self.M, max(1, self.plan.chunk_bytes // (width * self.dtype.itemsize)))
        buffer = self.row_weight_N.new_empty(0 if self.loss.gathers else C * width)
        chunks = list(pairwise(_bounds(self.M, C)))
        together, slab_GV = self._slab(C)
        for at in range(0, len(chunks), together):
            group = chunks[at : at + together]
            first, last = group[0][0], group[-1][1]
            for start, stop in group:
                place_CV = None if slab_GV is None else slab_GV[start - first : stop - first]
                self._run_chunk(start, stop, buffer, place_CV)
            if slab_GV is not None:
                self._add_dense(first, last, slab_GV[: last - first])

    def _slab(self, C: int) -> tuple[int, Tensor | None]:
        """Return the chunks of a slab and its memory; None: gradients go over their logits."""
        if self.keeps and not self.sparse:
            return max(1, self.M), self.out.slab_NV
        row_bytes = padded(self.student.vocab) * self.gradient_dtype.itemsize
        chunks = self.sizes.slab_bytes // max(1, C * row_bytes)
        if not (self.sums and self.needs.weight) or chunks < 2:
            return 1, None
        G = min(chunks * C, max(1, self.M))
        return chunks, self.row_weight_N.new_empty(
            G, padded(self.student.vocab), dtype=self.gradient_dtype
        )

    def _run_chunk(self, start: int, stop: int, buffer: Tensor, place_CV: Tensor | None) -> None:
        """Project a chunk, run the row function over its blocks, use an in-place gradient."""
        rows, C, V = self.rows(start, stop), stop - start, self.student.vocab
        H, S = 0 if self.loss.gathers else len(self.heads), padded(V)
        logits_HCV = buffer[: H * C * S].view(H, C, S)[..., :V]
        if not self.loss.gathers:
            self._project(rows, logits_HCV)
        in_place = any(self.needs) and not self.sparse and place_CV is None
        if in_place:
            # a 16-bit gradient begins where its row of logits does
            place_CV = logits_HCV[0].view(self.gradient_dtype)
        B = C
        if not self.loss.gathers and self.plan.vocabulary is WHOLE:
            B = max(1, self.sizes.block_bytes // (V * self.dtype.itemsize))
        for at in range(0, C, B):
            block = slice(at, min(at + B, C))
            where = self.rows(start + at, start + block.stop)
            chunk = Chunk(
                *self._sides(where, logits_HCV[:, block]),
                None if self.target_N is None else self.target_N[where].long(),
                None if place_CV is None else place_CV[block, :V],
                any(self.needs),
                self.plan.vocabulary,
            )
            self._write(where, self.function(chunk, self.params))
        if in_place and place_CV is not None:
            self._add_dense(start, stop, place_CV)

    def _project(self, rows: Rows, logits_HCV: Tensor) -> None:
        """Write the raw logits of both models, by one product if they share the head."""
        if len(self.heads) == 2 and self.heads[0].shares_weight(self.heads[1]):
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
            ids_CK, values_CK = teacher.ids[rows], teacher.values[rows].to(self.dtype)
            # an id that does not exist must not be read: it makes its row NaN, unless it is absent
            exists_CK = (ids_CK >= 0) & (ids_CK < student.vocab)
            values_CK = torch.where(exists_CK | values_CK.isneginf(), values_CK, torch.nan)
            stored = TopK(torch.where(exists_CK, ids_CK, 0), values_CK)
        if self.loss.gathers:
            dot, x_CD = self.backend.gather_dot, student.hidden_ND[rows]
            weight_VD = None if student.weight_VD is None else student.weight()
            operands = x_CD, weight_VD, student.bias(self.dtype), student.transform
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

    def _add_dense(self, start: int, stop: int, gradient_CV: Tensor) -> None:
        """Multiply a finished gradient of logits into dX, and into the sums."""
        rows, student, factor = self.rows(start, stop), self.student, self.student.transform.factor
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
            total_VD = self.out.weight_VD[: student.vocab]
            _products.add_weight_gradient(*operands, total_VD, first=start == 0)
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

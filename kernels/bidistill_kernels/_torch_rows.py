"""The torch back-end: logits of a chunk and sparse products in plain PyTorch, on every device.

Logits are made final in place when they arrive, so that a loss sees numbers and nothing else; on
CPU it sees them a block at a time, which stays in the cache. Shapes: N tokens, C rows, V
vocabulary, D width, K ids a row.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bidistill_kernels._rows import Chunk, Logits, RowFunction, RowResult
from bidistill_kernels._top import top_ids
from bidistill_kernels._vocabulary import Vocabulary
from bidistill_kernels.transform import LogitTransform

# A temporary of the sparse products, (rows, K, D)
_GATHER_BYTES = 16 << 20


class TorchLogits:
    """`Logits` of which `raw_CV` is final already."""

    def __init__(self, raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> None:
        """Take the raw products over and transform them in place."""
        if bias_V is not None:
            raw_CV.add_(bias_V)
        self.raw_CV, self.bias_V, self.transform = transform.apply_(raw_CV), bias_V, transform

    def at(self, ids_CK: Tensor) -> Tensor:
        """See `Logits`."""
        return self.raw_CV.gather(1, ids_CK)

    def top(self, k: int) -> Tensor:
        """See `Logits`."""
        return top_ids(self.raw_CV, k)

    def log_sum_exp(self) -> Tensor:
        """See `Logits`."""
        return self.raw_CV.logsumexp(-1)

    def mask_(self, ids_CK: Tensor) -> None:
        """See `Logits`."""
        self.raw_CV.scatter_(1, ids_CK, -torch.inf)

    def softmax_gradient(self, base_C: Tensor, factor_C: Tensor, gradient_CV: Tensor) -> None:
        """See `Logits`."""
        slope_CV = None if self.transform.softcap is None else self.transform.slope(self.raw_CV)
        # a row whose ids are all ruled out: -inf - -inf would be NaN
        base_C1 = base_C.clamp(min=torch.finfo(base_C.dtype).min)[:, None]
        p_CV = self.raw_CV.sub_(base_C1).exp_().mul_(factor_C[:, None])
        if slope_CV is not None:
            # of an id that is ruled out it is -inf, and its part 0
            p_CV.mul_(slope_CV.nan_to_num_(neginf=0.0))
        gradient_CV.copy_(p_CV)

    def chain(self, values_CK: Tensor, logits_CK: Tensor) -> Tensor:
        """See `Logits`."""
        if self.transform.softcap is None:
            return values_CK
        return values_CK * self.transform.slope(logits_CK)


class Gathered:
    """`Logits` of which only those at given ids are asked for; nothing is projected."""

    def __init__(
        self,
        dot: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        hidden_CD: Tensor,
        weight_VD: Tensor | None,
        bias_V: Tensor | None,
        transform: LogitTransform,
    ) -> None:
        """Keep the operands and the back-end's `gather_dot`; without a head they are logits."""
        self.dot, self.hidden_CD, self.weight_VD = dot, hidden_CD, weight_VD
        self.bias_V, self.transform = bias_V, transform

    def at(self, ids_CK: Tensor) -> Tensor:
        """See `Logits`."""
        if self.weight_VD is None:
            raw_CK = self.hidden_CD.gather(1, ids_CK)
            raw_CK = raw_CK.to(torch.promote_types(raw_CK.dtype, torch.float32))
        else:
            raw_CK = self.dot(self.hidden_CD, self.weight_VD, ids_CK, self.bias_V)
        return self.transform.apply_(raw_CK)

    chain = TorchLogits.chain


DenseFunction: TypeAlias = Callable[
    [Tensor, Tensor | None, Tensor | None, Vocabulary, Sequence[float], bool], "DenseResult"
]


class DenseResult(NamedTuple):
    """What a dense loss of final logits returns to the torch back-end."""

    loss_C: Tensor
    gradient_CV: Tensor | None
    """With respect to the student's final logits; may be one of the input buffers."""
    stats: tuple[Tensor, ...] = ()


def dense_rows(function: DenseFunction) -> RowFunction:
    """Make a row function of one on final logits; it adds the slope of the soft-cap."""

    @wraps(function)
    def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
        student, teacher = chunk.student, chunk.teacher
        capped = chunk.need_gradient and student.transform.softcap is not None
        slope_CV = student.transform.slope(student.raw_CV) if capped else None
        teacher_CV = None if teacher is None else _raw(teacher)
        sides = student.raw_CV, teacher_CV, chunk.target_C, chunk.vocabulary
        result = function(*sides, params, chunk.need_gradient)
        if result.gradient_CV is not None:
            assert chunk.gradient_CV is not None
            if slope_CV is not None:
                result.gradient_CV.mul_(slope_CV)
            # in 16 bits it would overlap itself, where it goes over the logits it was made of
            chunk.gradient_CV.copy_(result.gradient_CV.to(chunk.gradient_CV.dtype))
        return RowResult(result.loss_C, result.stats)

    return rows


def _raw(teacher: object) -> Tensor:
    assert isinstance(teacher, TorchLogits)
    return teacher.raw_CV


def logits(raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Logits:
    """Return the `Logits` of raw products, which are overwritten."""
    return TorchLogits(raw_CV, bias_V, transform)


def _parts(rows: int, bytes_a_row: int) -> list[slice]:
    step = max(1, _GATHER_BYTES // max(1, bytes_a_row))
    return [slice(start, start + step) for start in range(0, rows, step)]


def gather_dot(
    hidden_CD: Tensor, weight_VD: Tensor, ids_CK: Tensor, bias_V: Tensor | None
) -> Tensor:
    """Return the products of each hidden state with the head rows of its ids, and their bias."""
    dtype = torch.promote_types(hidden_CD.dtype, torch.float32)
    out_CK = torch.empty(ids_CK.shape, dtype=dtype, device=ids_CK.device)
    K, D = ids_CK.shape[1], hidden_CD.shape[1]
    for rows in _parts(len(ids_CK), K * D * dtype.itemsize):
        weight_CKD = weight_VD[ids_CK[rows]].to(dtype)
        out_CK[rows] = (weight_CKD @ hidden_CD[rows].to(dtype)[..., None]).squeeze(2)
    return out_CK if bias_V is None else out_CK.add_(bias_V[ids_CK])


def sparse_dx(values_CK: Tensor, ids_CK: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """Write sum_k values[c, k] * weight[ids[c, k]]."""
    if weight_VD.dtype == values_CK.dtype and weight_VD.is_cpu and weight_VD.is_contiguous():
        # reads each row once and takes a quarter of the time of a gather and a product
        # (bench/cpu_products.py); any other head it would copy whole
        out_CD.copy_(embedding_bag(ids_CK, weight_VD, per_sample_weights=values_CK, mode="sum"))
        return
    K, D = ids_CK.shape[1], weight_VD.shape[1]
    for rows in _parts(len(ids_CK), K * D * out_CD.dtype.itemsize):
        weight_CKD = weight_VD[ids_CK[rows]].to(out_CD.dtype)
        out_CD[rows] = torch.bmm(values_CK[rows][:, None], weight_CKD).squeeze(1)


def sparse_dw(values_NK: Tensor, ids_NK: Tensor, hidden_ND: Tensor, out_VD: Tensor) -> None:
    """Add values[n, k] * hidden[n] to row ids[n, k]; rounds once, also to a 16-bit `out`."""
    dtype = values_NK.dtype
    total_VD = out_VD if out_VD.dtype == dtype else out_VD.to(dtype)
    K, D = ids_NK.shape[1], hidden_ND.shape[1]
    for rows in _parts(len(ids_NK), K * D * dtype.itemsize):
        outer_CKD = values_NK[rows][..., None] * hidden_ND[rows].to(dtype)[:, None]
        total_VD.index_add_(0, ids_NK[rows].flatten(), outer_CKD.flatten(0, 1))
    if total_VD is not out_VD:
        out_VD.copy_(total_VD)


def sparse_dbias(values_NK: Tensor, ids_NK: Tensor, out_V: Tensor) -> None:
    """Add values[n, k] to entry ids[n, k]."""
    total_V = out_V.to(values_NK.dtype)
    out_V.copy_(total_V.index_add_(0, ids_NK.flatten(), values_NK.flatten()))

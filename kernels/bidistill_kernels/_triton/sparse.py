"""Products with the head at K ids a token, where a full one would cost N V D.

gather_dot    z_nk = x_n . W[id_nk] + bias[id_nk]
sparse_dx     dX_n = sum_k v_nk W[id_nk]
sparse_dw     dW_i = sum over all (n, k) with id_nk = i of v_nk x_n
sparse_dbias  the same with x = 1

All sums are fp32 and in a fixed order: two runs agree in every bit. For dW the entries (n, k) are
sorted by id, and the program of the first entry of an id walks its segment; nothing is added
atomically. An entry of value 0 is not read, neither its head row nor its hidden state, so that
what is infinite there adds nothing.

Traffic: gather_dot and sparse_dx read N K rows of the head, each in one piece; sparse_dw reads at
most N K hidden states and writes each row it touches once; the sort is of N K 32-bit numbers. A
segment is one chain of reads, 8 entries at a time: an id that n tokens share takes n / 8 times the
latency of memory, while the others go on beside it.
Shapes: N tokens, C rows of a chunk, V vocabulary, D width, K ids a row, E = N K entries.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bidistill_kernels._triton.launch import NUM_STAGES, Variant, run_kernel


class Block(NamedTuple):
    """Rows and columns that a program takes at a time, and its warps."""

    rows: int
    columns: int
    num_warps: int


# Each thread has a column's every row, 16 bytes of a 16-bit one: no sum crosses threads inside a
# loop, and with rows spread over warps there were 8 barriers a program
GATHER = Block(4, 256, 1)  # 32 sums a thread; K = 10 wastes 2 rows of 12
SPREAD = Block(16, 256, 1)  # all rows of a small K in flight at once
# wide, as a program whose entry is not the first of its id is nothing but cost; of few rows, as
# most ids have few entries
SCATTER = Block(8, 1024, 4)
# a bias is a head of one column
SCATTER_BIAS = Block(64, 1, 1)


@triton.jit(do_not_specialize=["has_bias"])
def _gather_dot_kernel(
    hidden_ptr,  # (C, D)
    hidden_stride_c,
    weight_ptr,  # (V, D)
    weight_stride_v,
    ids_ptr,  # (C, K) int64
    bias_ptr,  # (V,) fp32
    has_bias,
    out_ptr,  # (C, K) fp32
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    hidden_ptr += c * hidden_stride_c
    ids = tl.load(ids_ptr + c * K + offs_k, mask=offs_k < K, other=0)
    row_ptr = weight_ptr + ids[:, None] * weight_stride_v
    # one sum per column, added up once at the end
    sum_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        x = tl.load(hidden_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        mask = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        w = tl.load(row_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_KD += x[None, :] * w
    bias = tl.load(bias_ptr + ids, mask=offs_k < K * has_bias, other=0.0)
    tl.store(out_ptr + c * K + offs_k, tl.sum(sum_KD, 1) + bias, mask=offs_k < K)


@triton.jit
def _sparse_dx_kernel(
    values_ptr,  # (C, K) fp32
    ids_ptr,  # (C, K) int64
    weight_ptr,  # (V, D)
    weight_stride_v,
    out_ptr,  # (C, D) fp32
    out_stride_c,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        values = tl.load(values_ptr + c * K + offs_k, mask=offs_k < K, other=0.0)
        ids = tl.load(ids_ptr + c * K + offs_k, mask=offs_k < K, other=0)
        mask = (values != 0.0)[:, None] & (offs_d < D)[None, :]
        row_ptr = weight_ptr + ids[:, None] * weight_stride_v
        w = tl.load(row_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_D += tl.sum(values[:, None] * w, 0)
    tl.store(out_ptr + c * out_stride_c + offs_d, sum_D, mask=offs_d < D)


@triton.jit
def _sparse_dw_kernel(
    sorted_ids_ptr,  # (E,) int32, ascending
    values_ptr,  # (E,) fp32
    token_ptr,  # (E,) int32
    end_ptr,  # (E,) int32, where the segment of this id ends
    hidden_ptr,  # (N, D)
    hidden_stride_n,
    out_ptr,  # (V, D)
    out_stride_v,
    V,
    D,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0)
    v = tl.load(sorted_ids_ptr + first)
    if (v == tl.load(sorted_ids_ptr + first - 1, mask=first > 0, other=-1)) | (v == V):
        return
    end = tl.load(end_ptr + first)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        values = tl.load(values_ptr + offs_e, mask=offs_e < end, other=0.0)
        n = tl.load(token_ptr + offs_e, mask=offs_e < end, other=0).to(tl.int64)
        row_ptr = hidden_ptr + n[:, None] * hidden_stride_n
        mask = (offs_e < end)[:, None] & (offs_d < D)[None, :]
        x = tl.load(row_ptr + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_D += tl.sum(values[:, None] * x, 0)
    out_ptr += v.to(tl.int64) * out_stride_v
    tl.store(out_ptr + offs_d, sum_D, mask=offs_d < D)


def _launch(kernel: Any, block: Block, grid: tuple[int, int], *arguments: Any) -> None:
    """Run a kernel whose last parameters are the rows and columns of a block."""
    run_kernel(kernel, grid, arguments[0], block.num_warps, *arguments, block.rows, block.columns)


def _rows(tensor: Tensor, other: Tensor) -> tuple[Tensor, int]:
    """Return hidden states and their row stride, in fp32 unless they have the other's dtype.

    So there are 5 variants of a kernel and not 9; mixed dtypes are rare.
    """
    tensor = tensor if tensor.dtype == other.dtype else tensor.float()
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


def gather_dot(
    hidden_CD: Tensor, weight_VD: Tensor, ids_CK: Tensor, bias_V: Tensor | None
) -> Tensor:
    """Return the products of each hidden state with the head rows of its ids, and their bias."""
    C, K = ids_CK.shape
    out_CK = torch.empty(C, K, dtype=torch.float32, device=ids_CK.device)
    assert weight_VD.stride(1) == 1 or weight_VD.shape[1] == 1
    _launch(
        _gather_dot_kernel,
        GATHER,
        (C, triton.cdiv(K, GATHER.rows)),
        *_rows(hidden_CD, weight_VD),
        weight_VD,
        weight_VD.stride(0),
        ids_CK.contiguous(),
        out_CK if bias_V is None else bias_V.float(),  # a pointer of its type, never read
        int(bias_V is not None),
        out_CK,
        K,
        hidden_CD.shape[1],
    )
    return out_CK


def sparse_dx(values_CK: Tensor, ids_CK: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """Write sum_k values[c, k] * weight[ids[c, k]] to an fp32 `out`."""
    D = weight_VD.shape[1]
    assert weight_VD.stride(1) == 1 or D == 1
    _launch(
        _sparse_dx_kernel,
        SPREAD,
        (len(ids_CK), triton.cdiv(D, SPREAD.columns)),
        values_CK.contiguous(),
        ids_CK.contiguous(),
        weight_VD,
        weight_VD.stride(0),
        out_CD,
        out_CD.stride(0),
        ids_CK.shape[1],
        D,
    )


def sparse_dw(values_NK: Tensor, ids_NK: Tensor, hidden_ND: Tensor, out_VD: Tensor) -> None:
    """Write the sum of values[n, k] * hidden[n] to row ids[n, k] of `out`, which holds zeros.

    It is rounded once, to the dtype of `out`.
    """
    _scatter(values_NK, ids_NK, _rows(hidden_ND, out_VD), out_VD, SCATTER)


def sparse_dbias(values_NK: Tensor, ids_NK: Tensor, out_V: Tensor) -> None:
    """Write the sum of values[n, k] to entry ids[n, k] of `out`, which holds zeros."""
    one = torch.ones(1, dtype=torch.float32, device=out_V.device)
    _scatter(values_NK, ids_NK, (one, 0), out_V[:, None], SCATTER_BIAS)


def _scatter(
    values_NK: Tensor, ids_NK: Tensor, hidden: tuple[Tensor, int], out_VD: Tensor, block: Block
) -> None:
    (V, D), E = out_VD.shape, ids_NK.numel()
    # entries of value 0 go to an id beyond the head: tokens left out can be most of all
    ids_E = torch.where(values_NK == 0, V, ids_NK).flatten().int()
    # stable, or the order of the sums, and their rounding, would change from run to run
    ids_E, order_E = torch.sort(ids_E, stable=True)
    _launch(
        _sparse_dw_kernel,
        block,
        (E, triton.cdiv(D, block.columns)),
        ids_E,
        values_NK.flatten()[order_E],
        (order_E // max(1, ids_NK.shape[1])).int(),
        torch.searchsorted(ids_E, ids_E, right=True, out_int32=True),
        *hidden,
        out_VD,
        out_VD.stride(0),
        V,
        D,
    )


_TYPES = {"bias_ptr": "*fp32", "out_ptr": "*fp32", "values_ptr": "*fp32"}
_TYPES |= {"ids_ptr": "*i64", "sorted_ids_ptr": "*i32", "token_ptr": "*i32", "end_ptr": "*i32"}


def _variant(name: str, kernel: Any, block: Block, **dtypes: str) -> Variant:
    types = _TYPES | {f"{tensor}_ptr": f"*{dtype}" for tensor, dtype in dtypes.items()}
    constexprs = dict(zip(kernel.arg_names[-2:], block[:2], strict=True))
    types |= dict.fromkeys(constexprs, "constexpr")
    signature = {each: types.get(each, "i32") for each in kernel.arg_names}
    label = " ".join([name, *dict.fromkeys(dtypes.values())])
    return Variant(label, kernel, signature, constexprs, block.num_warps, NUM_STAGES)


_MIXED = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp16")]
VARIANTS = [
    *(_variant("gather_dot", _gather_dot_kernel, GATHER, hidden=x, weight=w) for x, w in _MIXED),
    *(_variant("sparse_dx", _sparse_dx_kernel, SPREAD, weight=w) for w in ("fp32", "bf16", "fp16")),
    *(_variant("sparse_dw", _sparse_dw_kernel, SCATTER, hidden=x, out=out) for x, out in _MIXED),
    *(
        _variant("sparse_dbias", _sparse_dw_kernel, SCATTER_BIAS, hidden="fp32", out=out)
        for out in ("fp32", "bf16", "fp16")
    ),
]

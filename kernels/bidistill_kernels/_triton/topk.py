"""Ids of the k largest final logits of each row: exactly k, lowest id first on ties.

NaN counts as the largest, -0 equals +0, and ids of -inf logits fill up what is missing. A logit is
ranked by a 64-bit key: its fp32 bits, made to compare as integers, and below them a number that
falls with the id. The keys of a row are distinct, so "the k largest keys, descending" is the whole
definition, ties included.

1. `_tile_max_kernel` writes the largest value of each tile of 64 ids: the one read of the logits.
2. `_merge_kernel`, one program a row, merges the tiles. Registers hold the head of each tile: the
   largest key left in it. k times: the tile of the largest head is read again, its largest key not
   above the head is the next result, and the key after that is its new head.

Exact: keys of a tile are taken in descending order, so what is left of it is what its head bounds;
no list of taken ids is kept. From step 1 a head has its value but no id, and takes the place before
the tile's first. Every id of a lower tile is below every id of a higher one, so also then the
largest head is that of the tile which holds the largest key left; induction over the rounds gives
all k. So they lie in the first k tiles by (maximum, lowest tile), and only those are read again.
Should the steps round the tanh of a soft-cap differently, two tiles may change places whose maxima
differ by that rounding; the ids still are k different ones, which no shared bound would ensure.

Traffic of a row: 4 V bytes, V / 8 for the tile maxima, at most 256 k for tiles read again. Beyond
`MAX_K` ids or `MAX_V` columns `torch.topk` finds the same keys, at about 60 V bytes.
Shapes: C rows of a chunk, V vocabulary, K ids, L tiles.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bidistill_kernels._triton.launch import NUM_STAGES, TritonLogits, Variant, run_kernel
from bidistill_kernels._triton.pieces import final_logits
from bidistill_kernels.transform import LogitTransform

# 256 bytes; at 128 a round would read twice as much to save half of the heads
TILE = 64
# 16 KiB a program, all in flight at once, 16 ids a thread. Programs do not loop over the row, so
# that a few rows keep the device busy as well
TILES_A_PROGRAM, TILE_WARPS = 64, 8
# number of tiles, at most -> warps of the merge: 8 to 16 heads of 8 bytes a thread
HEADS = {1024: 4, 2048: 4, 4096: 8}
MAX_V = TILE * max(HEADS)
# a round waits for one read of memory, 1 us or so: about here torch.topk would be as fast
MAX_K = 1024
# int64 keys of the torch path that exist at a time: 256 MiB
KEYS_A_PART = 1 << 25

_NONE = tl.constexpr(-(2**63))  # below every key: a column beyond V, a tile used up


@triton.jit
def _ordered(logits):
    """int32 that compare as the logits do, NaN largest; -2^31 is left free."""
    bits = tl.where(logits == 0.0, 0, logits.to(tl.int32, bitcast=True))
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(logits == logits, bits, 0x7FFFFFFF)


@triton.jit
def _key(ordered, ids):
    """One even int64 a logit: larger for larger values and, where these are equal, lower ids."""
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFE - 2 * ids)


@triton.jit
def _id(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)) >> 1


@triton.jit
def _is_tile(key):
    return (key & 1) == 1


@triton.jit(do_not_specialize=["has_bias"])
def _tile_max_kernel(
    ptr,  # (C, V) fp32
    bias_ptr,  # (V,) fp32
    stride_c,
    has_bias,
    inner,
    outer,
    max_ptr,  # (C, L) int32, ordered as the logits
    V,
    L,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # the grid has one dimension, of C * programs: a second one ends at 65535 on CUDA
    programs = tl.cdiv(L, BLOCK_L)
    c = (tl.program_id(0) // programs).to(tl.int64)
    offs_l = tl.program_id(0) % programs * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_v = offs_l[:, None] * TILE + tl.arange(0, TILE)[None, :]
    model = (ptr + c * stride_c, bias_ptr, has_bias, inner, outer)
    ordered = _ordered(final_logits(model, offs_v, V, SOFTCAP))
    # as integers: a maximum of fp32 drops NaN
    top = tl.max(tl.where(offs_v < V, ordered, -0x80000000), 1)
    tl.store(max_ptr + c * L + offs_l, top, mask=offs_l < L)


@triton.jit(do_not_specialize=["has_bias"])
def _merge_kernel(
    ptr,  # (C, V) fp32
    bias_ptr,  # (V,) fp32
    stride_c,
    has_bias,
    inner,
    outer,
    max_ptr,  # (C, L) int32, ordered as the logits
    ids_ptr,  # (C, K) int64
    V,
    L,
    K,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    model = (ptr + c * stride_c, bias_ptr, has_bias, inner, outer)
    offs_l = tl.arange(0, BLOCK_L)
    top = tl.load(max_ptr + c * L + offs_l, mask=offs_l < L, other=0)
    # + 1: before the first id of the tile, and odd, which tells it from the key of a logit
    head = tl.where(offs_l < L, _key(top, offs_l * TILE) + 1, _NONE)
    for k in range(K):
        first = tl.max(head, 0)
        tile = _id(first) // TILE
        offs_v = tile * TILE + tl.arange(0, TILE)
        keys = _key(_ordered(final_logits(model, offs_v, V, SOFTCAP)), offs_v)
        left = (offs_v < V) & ((keys <= first) | _is_tile(first))
        taken = tl.max(tl.where(left, keys, _NONE), 0)
        tl.store(ids_ptr + c * K + k, _id(taken).to(tl.int64))
        following = tl.max(tl.where(left & (keys < taken), keys, _NONE), 0)
        head = tl.where(offs_l == tile, following, head)


_TYPES = {
    "ptr": "*fp32",
    "bias_ptr": "*fp32",
    "stride_c": "i32",
    "has_bias": "i32",
    "inner": "fp32",
    "outer": "fp32",
    "max_ptr": "*i32",
    "ids_ptr": "*i64",
    "V": "i32",
    "L": "i32",
    "K": "i32",
}


def _variant(name: str, kernel: Any, warps: int, **constexprs: Any) -> Variant:
    constexprs["TILE"] = TILE
    signature = {each: _TYPES.get(each, "constexpr") for each in kernel.arg_names}
    return Variant(name, kernel, signature, constexprs, warps, NUM_STAGES)


def _tile_max(softcap: bool) -> Variant:
    name = "tile maxima softcap" if softcap else "tile maxima"
    blocks = {"SOFTCAP": softcap, "BLOCK_L": TILES_A_PROGRAM}
    return _variant(name, _tile_max_kernel, TILE_WARPS, **blocks)


def _merge(heads: int) -> Variant:
    # with a soft-cap or not: its cost is nothing here, and there are half as many variants
    blocks = {"SOFTCAP": True, "BLOCK_L": heads}
    return _variant(f"merge of {heads} tiles", _merge_kernel, HEADS[heads], **blocks)


VARIANTS = [*map(_tile_max, (False, True)), *map(_merge, HEADS)]


def _launch(variant: Variant, programs: int, like: Tensor, **arguments: Any) -> None:
    arguments |= variant.constexprs
    run_kernel(variant.kernel, (programs,), like, variant.num_warps, **arguments)


def top_ids(raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform, k: int) -> Tensor:
    """Return the ids of the K = min(k, V) largest final logits, best first, (C, K) int64."""
    C, V = raw_CV.shape
    K = min(k, V)
    ids_CK = torch.empty(C, K, dtype=torch.int64, device=raw_CV.device)
    if K > MAX_K or V > MAX_V:
        _torch_top_ids(raw_CV, bias_V, transform, ids_CK)
        return ids_CK
    if not ids_CK.numel():  # an empty grid is an error of the driver
        return ids_CK
    L = triton.cdiv(V, TILE)
    max_CL = torch.empty(C, L, dtype=torch.int32, device=raw_CV.device)
    logits = TritonLogits(raw_CV, bias_V, transform)
    arguments = {**logits.arguments(), "max_ptr": max_CL, "V": V, "L": L}
    _launch(_tile_max(logits.capped), C * triton.cdiv(L, TILES_A_PROGRAM), raw_CV, **arguments)
    heads = min(tiles for tiles in HEADS if tiles >= L)
    _launch(_merge(heads), C, raw_CV, **arguments, ids_ptr=ids_CK, K=K)
    return ids_CK


def _torch_top_ids(
    raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform, ids_CK: Tensor
) -> None:
    """Write the same by `torch.topk`, which is exact as no two keys are equal."""
    V, k = raw_CV.shape[1], ids_CK.shape[1]
    rank_V = 0x7FFFFFFF - torch.arange(V, device=raw_CV.device)
    step = max(1, KEYS_A_PART // V)
    for part_CV, part_CK in zip(raw_CV.split(step), ids_CK.split(step), strict=True):
        z_CV = part_CV.clone() if bias_V is None else part_CV + bias_V
        z_CV = transform.apply_(z_CV)
        bits_CV = z_CV.view(torch.int32).masked_fill(z_CV == 0, 0)
        bits_CV = torch.where(bits_CV < 0, bits_CV ^ 0x7FFFFFFF, bits_CV)
        bits_CV.masked_fill_(z_CV.isnan(), 0x7FFFFFFF)
        keys_CV = bits_CV.long().bitwise_left_shift_(32).bitwise_or_(rank_V)
        part_CK.copy_(keys_CV.topk(k).indices)

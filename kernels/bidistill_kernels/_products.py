"""Matrix products with the head: what is multiplied in which precision.

Results are fp32 (fp64 for fp64 input). Where the device multiplies 16-bit operands and returns
fp32, both operands stay as they are; elsewhere they are converted a slab of head rows at a time, so
that no full fp32 copy of a 16-bit head exists. Shapes: C rows of a chunk, V vocabulary, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a 16-bit head converted at a time
SLAB_ROWS = 4096
# Head rows that a CPU projects at a time, which is somewhat faster than all at once; the other
# products gain nothing, see bench/cpu_products.py
PROJECTED_ROWS = 2048
# before, torch wants a sum of 16 bits where the operands have them
_SUMS_IN_FP32 = torch.__version__ >= "2.11"  # compared as versions
HALVES = (torch.bfloat16, torch.float16)
# CUDA only; 16-bit products rounded to 16 bits would cost 16 to 80 % of a distillation gradient
_HAS_FP32_OUT = "dtype_out" in torch.ops.aten.mm.overloads()


def keeps_halves(a: Tensor, b: Tensor) -> bool:
    """Tell whether the device multiplies these 16-bit operands into fp32."""
    if not (_HAS_FP32_OUT and a.is_cuda and a.dtype == b.dtype and a.dtype in HALVES):
        return False
    return torch.cuda.get_device_capability(a.device)[0] >= 8


def _slabs(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the head in pieces of `dtype`: one piece if it has that dtype already."""
    V = len(weight_VD)
    step = max(1, V) if weight_VD.dtype == dtype else SLAB_ROWS
    for start in range(0, V, step):
        ids = slice(start, min(start + step, V))
        yield ids, weight_VD[ids].to(dtype)


def project(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """Write hidden @ weight.T."""
    if keeps_halves(hidden_CD, weight_VD):
        torch.mm(hidden_CD, weight_VD.T, out_dtype=out_CV.dtype, out=out_CV)
        return
    x_CD = hidden_CD.to(out_CV.dtype)
    step = len(weight_VD) if x_CD.is_cuda else PROJECTED_ROWS
    for ids, weight_SD in _slabs(weight_VD, out_CV.dtype):
        pieces = weight_SD.split(step), out_CV[:, ids].split(step, dim=1)
        for weight, out in zip(*pieces, strict=True):
            torch.mm(x_CD, weight.T, out=out)


def hidden_gradient(gradient_CV: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient @ weight, in `dtype`."""
    if keeps_halves(gradient_CV, weight_VD):
        return torch.mm(gradient_CV, weight_VD, out_dtype=dtype)
    out_CD = gradient_CV.new_zeros(len(gradient_CV), weight_VD.shape[1], dtype=dtype)
    for ids, weight_SD in _slabs(weight_VD, dtype):
        out_CD.addmm_(gradient_CV[:, ids].to(dtype), weight_SD)
    return out_CD


def add_weight_gradient(
    gradient_CV: Tensor, hidden_CD: Tensor, scale_C: Tensor, out_VD: Tensor, *, first: bool = False
) -> None:
    """Add gradient.T @ (scale * hidden) to an fp32 sum; as the first term it overwrites the memory.

    The scale goes to the narrow operand, never to the wide one.
    """
    dtype, beta = gradient_CV.dtype, 0 if first else 1
    if dtype == out_VD.dtype:
        x_CD = hidden_CD.to(dtype).mul(scale_C[:, None])
        out_VD.addmm_(gradient_CV.T, x_CD, beta=beta)
        return
    half_CD, peak = _scaled(hidden_CD, scale_C, dtype)
    if _SUMS_IN_FP32 and peak is None and keeps_halves(gradient_CV, half_CD):
        operands = out_VD, gradient_CV.T, half_CD
        torch.addmm(*operands, out_dtype=out_VD.dtype, beta=beta, out=out_VD)
        return
    for start in range(0, len(out_VD), SLAB_ROWS):
        ids = slice(start, start + SLAB_ROWS)
        part_SD = hidden_gradient(gradient_CV[:, ids].T, half_CD, out_VD.dtype)
        part_SD = part_SD if peak is None else part_SD.mul_(peak)
        write = out_VD[ids].copy_ if first else out_VD[ids].add_
        write(part_SD)


def weight_gradient(
    gradient_CV: Tensor, hidden_CD: Tensor, scale_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return gradient.T @ (scale * hidden) in `dtype`: one product, one rounding."""
    if gradient_CV.dtype == dtype == torch.bfloat16:
        return torch.mm(gradient_CV.T, _scaled(hidden_CD, scale_C, dtype)[0])
    # in fp16 the product may overflow before it is multiplied by what was taken out
    out_VD = scale_C.new_empty(gradient_CV.shape[1], hidden_CD.shape[1])
    add_weight_gradient(gradient_CV, hidden_CD, scale_C, out_VD, first=True)
    return out_VD.to(dtype)


def _scaled(hidden_CD: Tensor, scale_C: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return scale * hidden in 16 bits, and what the product must be multiplied by.

    fp16 has no room for scales like 1 / tokens: a power of two, which is exact, is taken out.
    """
    x_CD, peak = hidden_CD.to(scale_C.dtype), None
    if dtype == torch.float16 and len(scale_C):
        top = scale_C.abs().amax().clamp(min=torch.finfo(scale_C.dtype).tiny)
        peak = torch.exp2(torch.frexp(top).exponent.to(scale_C.dtype))
        scale_C = scale_C / peak
    return (x_CD * scale_C[:, None]).to(dtype), peak


def add_bias_gradient(gradient_CV: Tensor, scale_C: Tensor, out_V: Tensor) -> None:
    """Add gradient.T @ scale to an fp32 sum; never in 16 bits, which would bias all of it."""
    if gradient_CV.dtype == out_V.dtype:
        out_V.addmv_(gradient_CV.T, scale_C)
        return
    for start in range(0, len(out_V), SLAB_ROWS):
        ids = slice(start, start + SLAB_ROWS)
        out_V[ids].addmv_(gradient_CV[:, ids].to(out_V.dtype).T, scale_C)

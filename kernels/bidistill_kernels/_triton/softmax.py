"""Log-sum-exp of rows of logits, and gradients that are a softmax times a number of the row.

lse_n = logsumexp_v(s_nv); gradient_nv = exp(s_nv - base_n) * factor_n * slope of the soft-cap.

A row whose ids are all ruled out has lse -inf; a base of -inf gives a gradient of 0. Each kernel
reads the logits once; the gradient is written once, perhaps to where they are.
Shapes: C rows of a chunk, V vocabulary.
"""

import triton
import triton.language as tl
from torch import Tensor

from bidistill_kernels._triton.launch import TritonLogits, launch, variants
from bidistill_kernels._triton.pieces import final_logits, row_statistics, store_gradient


@triton.jit(do_not_specialize=["has_bias"])
def _log_sum_exp_kernel(
    ptr,  # (C, V) fp32
    bias_ptr,  # (V,) fp32
    stride_c,
    has_bias,
    inner,
    outer,
    lse_ptr,  # (C,) fp32
    V,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    model = (ptr + c * stride_c, bias_ptr, has_bias, inner, outer)
    top, total = row_statistics(model, V, SOFTCAP, BLOCK_V)
    tl.store(lse_ptr + c, top + tl.log(total))


@triton.jit(do_not_specialize=["has_bias"])
def _softmax_gradient_kernel(
    ptr,  # (C, V) fp32
    bias_ptr,  # (V,) fp32
    stride_c,
    has_bias,
    inner,
    outer,
    base_ptr,  # (C,) fp32
    factor_ptr,  # (C,) fp32
    gradient_ptr,  # (C, V), may share the logits' storage
    gradient_stride_c,
    slope_rate,  # of the soft-cap, also where the logits were capped earlier
    V,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    model = (ptr + c * stride_c, bias_ptr, has_bias, inner, outer)
    gradient_ptr += c * gradient_stride_c
    base = tl.load(base_ptr + c)
    factor = tl.load(factor_ptr + c)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        s = final_logits(model, offs_v, V, SOFTCAP)
        # exp(-inf - -inf) would be NaN
        value = tl.where(base == -float("inf"), 0.0, tl.exp(s - base) * factor)
        # an id that is ruled out has s = -inf, and 0 * inf would be NaN
        u = tl.where((slope_rate == 0.0) | (value == 0.0), 0.0, s * slope_rate)
        store_gradient(gradient_ptr, value * ((1.0 - u) * (1.0 + u)), offs_v, V)


def log_sum_exp(logits: TritonLogits) -> Tensor:
    """Return the log-sum-exp of each row of final logits, (C,)."""
    rows_CV = logits.raw_CV
    lse_C = rows_CV.new_empty(len(rows_CV))
    arguments = logits.arguments()
    launch(
        "log_sum_exp",
        _log_sum_exp_kernel,
        rows_CV,
        **arguments,
        lse_ptr=lse_C,
        SOFTCAP=logits.capped,
    )
    return lse_C


def softmax_gradient(
    logits: TritonLogits, base_C: Tensor, factor_C: Tensor, gradient_CV: Tensor
) -> None:
    """Write exp(s - base) * factor * slope."""
    launch(
        "softmax_gradient",
        _softmax_gradient_kernel,
        logits.raw_CV,
        **logits.arguments(),
        base_ptr=base_C.contiguous(),
        factor_ptr=factor_C.contiguous(),  # a column of a table, say
        gradient_ptr=gradient_CV,
        gradient_stride_c=gradient_CV.stride(0),
        slope_rate=logits.slope_rate,
        SOFTCAP=logits.capped,
    )


VARIANTS = [
    *variants("log_sum_exp", _log_sum_exp_kernel, gradients=(None,)),
    *variants("softmax_gradient", _softmax_gradient_kernel, gradients=("fp32", "bf16", "fp16")),
]

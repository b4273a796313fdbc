"""Cross-entropy, per row of logits.

loss_n = logsumexp_v(s_nv) - s_ny, y = target_n; gradient_nv = p_nv - [v = y], subtracted in fp32.

Traffic of an element: read twice, the gradient written once; 2 exp. Without gradient read once.
Shapes: C rows of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._triton.launch import launch_rows, variants
from bidistill_kernels._triton.pieces import (
    final_logits_and_slope,
    label_logit,
    row_statistics,
    store_gradient,
)


@triton.jit(do_not_specialize=["student_has_bias"])
def _cross_entropy_kernel(
    student_ptr,  # (C, V) fp32
    student_bias_ptr,  # (V,) fp32
    student_stride_c,
    student_has_bias,
    student_inner,
    student_outer,
    target_ptr,  # (C,) int64
    gradient_ptr,  # (C, V), may share the student's storage
    gradient_stride_c,
    out_ptr,  # (2, C) fp32: loss and log-sum-exp
    V,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    student_ptr += c * student_stride_c
    student = (student_ptr, student_bias_ptr, student_has_bias, student_inner, student_outer)
    y = tl.load(target_ptr + c)
    s_y = label_logit(student, y, V, SOFTCAP)
    top, total = row_statistics(student, V, SOFTCAP, BLOCK_V)
    # both terms are relative to the row's maximum: logits of 1e4 cost no digits
    tl.store(out_ptr + c, tl.log(total) + (top - s_y))
    tl.store(out_ptr + tl.num_programs(0) + c, top + tl.log(total))
    if GRADIENT:
        gradient_ptr += c * gradient_stride_c
        over_total = tl.div_rn(1.0, total)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            s, slope = final_logits_and_slope(student, offs_v, V, SOFTCAP)
            gradient = tl.exp(s - top) * over_total - tl.where(offs_v == y, 1.0, 0.0)
            store_gradient(gradient_ptr, gradient * slope, offs_v, V)


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.cross_entropy`."""
    outputs = launch_rows(
        "cross_entropy", _cross_entropy_kernel, chunk, 2, target_ptr=chunk.target_C
    )
    return RowResult(outputs[0], outputs[1:])


VARIANTS = variants("cross_entropy", _cross_entropy_kernel)

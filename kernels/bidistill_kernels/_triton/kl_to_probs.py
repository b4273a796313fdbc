"""KL to given probabilities, per row of logits.

loss_n = sum_v q_nv (log max(q_nv, eps) - log p_nv); gradient_nv = p_nv * sum_u q_nu - q_nv.

Sweep 1 takes the statistics of the row of logits and the sum of q, which every entry of the
gradient needs, sweep 2 loss and gradient. Traffic of an element: s and q read twice, 16 bytes, the
gradient written once, 2 or 4 bytes; 2 exp, 1 log. Derivation:
kernels/README.md#kl-to-probabilities.
Shapes: C rows of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._triton.launch import TritonLogits, launch_rows, variants
from bidistill_kernels._triton.pieces import (
    LOWEST,
    final_logits,
    final_logits_and_slope,
    log1p,
    store_gradient,
)


@triton.jit
def _statistics(student, probs_ptr, V, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Sweep both rows once: the maximum of s, the sum of exp(s - maximum), the sum of q."""
    offs_v = tl.arange(0, BLOCK_V)
    top = LOWEST
    sum_V = tl.zeros([BLOCK_V], tl.float32)
    mass_V = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        s = final_logits(student, start + offs_v, V, SOFTCAP)
        mass_V += tl.load(probs_ptr + start + offs_v, mask=start + offs_v < V, other=0.0)
        new_top = tl.maximum(top, tl.max(s, 0))
        sum_V = sum_V * tl.exp(top - new_top) + tl.exp(s - new_top)
        top = new_top
    return top, tl.sum(sum_V, 0), tl.sum(mass_V, 0)


@triton.jit(do_not_specialize=["student_has_bias"])
def _kl_to_probs_kernel(
    student_ptr,  # (C, V) fp32
    student_bias_ptr,  # (V,) fp32
    student_stride_c,
    student_has_bias,
    student_inner,
    student_outer,
    probs_ptr,  # (C, V) fp32
    probs_stride_c,
    gradient_ptr,  # (C, V), may share the student's storage
    gradient_stride_c,
    out_ptr,  # (2, C) fp32: loss and log-sum-exp
    eps,
    V,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    student_ptr += c * student_stride_c
    probs_ptr += c * probs_stride_c
    gradient_ptr += c * gradient_stride_c
    student = (student_ptr, student_bias_ptr, student_has_bias, student_inner, student_outer)
    top, total, mass = _statistics(student, probs_ptr, V, SOFTCAP, BLOCK_V)
    mass = tl.where(mass == float("inf"), float("nan"), mass)  # of all ids, not of one
    log_total = tl.log(total)
    p_factor = tl.div_rn(mass, total)

    loss_V = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        s, slope = final_logits_and_slope(student, offs_v, V, SOFTCAP)
        q = tl.load(probs_ptr + offs_v, mask=offs_v < V, other=0.0)
        bounded = tl.maximum(q, eps)
        log_q, _below = log1p(bounded - 1.0, bounded)
        # 0 * inf: an id without probability adds nothing
        loss_V += tl.where(q == 0.0, 0.0, q * (log_q - ((s - top) - log_total)))
        if GRADIENT:
            gradient = tl.exp(s - top) * p_factor - q
            store_gradient(gradient_ptr, gradient * slope, offs_v, V)

    # 0, or the NaN of a row whose q are all 0
    nan = 0.0 * (mass + tl.div_rn(1.0, total))
    tl.store(out_ptr + c, tl.sum(loss_V, 0) + nan)
    tl.store(out_ptr + tl.num_programs(0) + c, top + log_total)


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.linear_kl_to_probs`."""
    (eps,) = params
    assert isinstance(chunk.teacher, TritonLogits)
    probs_CV = chunk.teacher.raw_CV
    outputs = launch_rows(
        "kl_to_probs",
        _kl_to_probs_kernel,
        chunk._replace(teacher=None),
        2,
        probs_ptr=probs_CV,
        probs_stride_c=probs_CV.stride(0),
        eps=eps,
    )
    return RowResult(outputs[0], outputs[1:])


VARIANTS = variants("kl_to_probs", _kl_to_probs_kernel)

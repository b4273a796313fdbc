"""Generalised Jensen-Shannon divergence, per row of logits.

m = beta * p_t + (1 - beta) * p_s; with r = log p_t - log p_s and F = log(m / p_s):
loss_n = sum_v beta * p_t (r - F) - (1 - beta) * p_s F, whose terms are not negative;
gradient_nv = (1 - beta) * p_s (sum_u p_su F_u - F_v).

F = log1p(beta * (e^r - 1)) for |r| < 1, with e^r - 1 a polynomial. For |r| < 1/4 the term is
p_s (w + beta (e^r - 1)((1 - beta) r + w)) with w = beta * r - F of order r^2: nothing of order r is
left to cancel however close the models are. For |r| >= 1, F = max(r, 0) + log((1 - c) + c e^-|r|),
c = beta below r = 0 and 1 - beta above, never overflows.

Sweep 1 takes each row's statistics, sweep 2 the loss and sum p_s F, sweep 3 the gradient. Traffic
of an element: both logits read three times, the gradient written once; 7 exp, 2 log. Masked ids as
in `bidistill_kernels.jsd`. Derivation: kernels/README.md#jsd.
Shapes: C rows of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._triton.launch import launch_rows, variants
from bidistill_kernels._triton.pieces import (
    final_logits,
    final_logits_and_slope,
    log1p,
    log_ratio,
    pair_statistics,
    store_gradient,
)


@triton.jit
def _mixture(r, near, q, beta, one_less):
    """F = log(m / p_s) as a sum (high, low), e^r - 1 where `near`, beta * r - F for |r| < 1/4.

    one_less = 1 - beta.
    """
    grown = r + r * r * q
    e = tl.exp(-tl.abs(r))
    c = tl.where(r > 0, one_less, beta)
    # 1 - c comes from the host: 1 - beta is 1 in fp32 when beta is below 3e-8
    x = tl.where(near, beta * grown, c * (e - 1.0))
    u = tl.where(near, 1.0 + x, tl.where(r > 0, beta, one_less) + c * e)
    high = tl.where(near, 0.0, tl.maximum(r, 0.0))
    low, below = log1p(x, u)
    return high, low, grown, below - beta * r * r * q


@triton.jit(do_not_specialize=["student_has_bias", "teacher_has_bias"])
def _jsd_kernel(
    student_ptr,  # (C, V) fp32
    student_bias_ptr,  # (V,) fp32
    student_stride_c,
    student_has_bias,
    student_inner,
    student_outer,
    teacher_ptr,  # (C, V) fp32
    teacher_bias_ptr,  # (V,) fp32
    teacher_stride_c,
    teacher_has_bias,
    teacher_inner,
    teacher_outer,
    gradient_ptr,  # (C, V), may share the student's storage
    gradient_stride_c,
    out_ptr,  # (3, C) fp32: loss and log-sum-exps
    beta,
    one_less,
    V,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    student_ptr += c * student_stride_c
    teacher_ptr += c * teacher_stride_c
    student = (student_ptr, student_bias_ptr, student_has_bias, student_inner, student_outer)
    teacher = (teacher_ptr, teacher_bias_ptr, teacher_has_bias, teacher_inner, teacher_outer)
    top_s, sum_s, top_t, sum_t, _ = pair_statistics(student, teacher, V, SOFTCAP, BLOCK_V)
    # log of the quotient: a difference of two logarithms near 10 would be off by 1e-6
    over_s, over_t = tl.div_rn(1.0, sum_s), tl.div_rn(1.0, sum_t)
    log_sums = tl.log(tl.div_rn(sum_s, sum_t))

    loss_V = tl.zeros([BLOCK_V], tl.float32)
    p_F_V = tl.zeros([BLOCK_V], tl.float32)
    p_V = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        s = final_logits(student, offs_v, V, SOFTCAP)
        t = final_logits(teacher, offs_v, V, SOFTCAP)
        p_s = tl.exp(s - top_s) * over_s
        p_t = tl.exp(t - top_t) * over_t
        r, _gap_v, near, q = log_ratio(s, t, top_s, top_t, log_sums)
        high, low, grown, bend = _mixture(r, near, q, beta, one_less)
        p_t = tl.where(near, p_s + p_s * grown, p_t)
        rest = tl.where(near, r, tl.minimum(r, 0.0)) - low  # r - F, finite at r = inf
        # 0 * inf: an id without probability adds nothing to the mean over that side
        p_F = tl.where(p_s == 0.0, 0.0, p_s * (high + low))
        term = beta * tl.where(p_t == 0.0, 0.0, p_t * rest) - one_less * p_F
        # the same with beta * p_s r taken out of both products
        tiny = p_s * (bend + beta * grown * (one_less * r + bend))
        loss_V += tl.where(tl.abs(r) < 0.25, tiny, term)
        p_F_V += p_F
        p_V += p_s
    loss = tl.sum(loss_V, 0)
    # of the p as they are: where one p is almost 1, mean_F - F of its id is but a rounding error
    mean_F = tl.div_rn(tl.sum(p_F_V, 0), tl.sum(p_V, 0))
    C = tl.num_programs(0)
    tl.store(out_ptr + c, loss)
    tl.store(out_ptr + C + c, top_s + tl.log(sum_s))
    tl.store(out_ptr + 2 * C + c, top_t + tl.log(sum_t))
    if GRADIENT:
        gradient_ptr += c * gradient_stride_c
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            s, slope = final_logits_and_slope(student, offs_v, V, SOFTCAP)
            t = final_logits(teacher, offs_v, V, SOFTCAP)
            p_s = tl.exp(s - top_s) * over_s
            r, _gap_v, near, q = log_ratio(s, t, top_s, top_t, log_sums)
            high, low, grown, bend = _mixture(r, near, q, beta, one_less)
            gradient = one_less * p_s * tl.where(p_s == 0.0, mean_F, mean_F - (high + low))
            store_gradient(gradient_ptr, gradient * slope, offs_v, V)


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.jsd`."""
    (beta,) = params
    outputs = launch_rows("jsd", _jsd_kernel, chunk, 3, beta=beta, one_less=1 - beta)
    return RowResult(outputs[0], outputs[1:])


VARIANTS = variants("jsd", _jsd_kernel)

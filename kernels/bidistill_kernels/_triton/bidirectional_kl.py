"""Forward and reverse KL and cross-entropy, per row of logits.

loss_n = forward * KL(p_t || p_s) + reverse * KL(p_s || p_t) + cross_entropy * -log p_s[y]; with
r = log p_t - log p_s and d = p_t - p_s:
KL(p_t || p_s) = sum p_t r - d and KL(p_s || p_t) = sum d - p_s r, whose terms are not negative;
gradient = -forward * d + reverse * p_s * (sum_u p_su r_u - r) + cross_entropy * (p_s - [v = y]).

Sweep 1 takes each row's statistics and sum_u p_su r_u, sweep 2 losses and gradient. With
q = (e^r - 1 - r) / r^2, a polynomial for |r| < 1,
d = p_s (r + r^2 q), p_t r - d = p_s r^2 (1 - q + r q), d - p_s r = p_s r^2 q:
nothing cancels however close the models are, and no third exponential is taken. Beyond, d is the
plain difference, to a few 1e-6 of itself.

Masked ids as in `bidistill_kernels.bidirectional_kl`. Traffic of an element: both logits read
twice, the gradient written once; 4 exp. Derivation: kernels/README.md#bidirectional-kl.
Shapes: C rows of a chunk, V vocabulary.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from bidistill_kernels._rows import Chunk, RowResult
from bidistill_kernels._triton.launch import launch_rows, variants
from bidistill_kernels._triton.pieces import (
    final_logits,
    final_logits_and_slope,
    label_logit,
    log_ratio,
    pair_statistics,
    store_gradient,
)


@triton.jit(do_not_specialize=["student_has_bias", "teacher_has_bias"])
def _bidirectional_kl_kernel(
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
    target_ptr,  # (C,) int64, read if cross_entropy is not 0
    gradient_ptr,  # (C, V), may share the student's storage
    gradient_stride_c,
    out_ptr,  # (5, C) fp32: loss and statistics
    forward,
    reverse,
    cross_entropy,
    V,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    student_ptr += c * student_stride_c
    teacher_ptr += c * teacher_stride_c
    gradient_ptr += c * gradient_stride_c
    student = (student_ptr, student_bias_ptr, student_has_bias, student_inner, student_outer)
    teacher = (teacher_ptr, teacher_bias_ptr, teacher_has_bias, teacher_inner, teacher_outer)
    y = tl.load(target_ptr + c, mask=cross_entropy != 0.0, other=-1)
    s_y = label_logit(student, y, V, SOFTCAP)

    top_s, sum_s, top_t, sum_t, gap = pair_statistics(student, teacher, V, SOFTCAP, BLOCK_V)
    over_s, over_t = tl.div_rn(1.0, sum_s), tl.div_rn(1.0, sum_t)
    # log of the quotient: a difference of two logarithms near 10 would be off by 1e-6
    log_sums = tl.log(tl.div_rn(sum_s, sum_t))

    forward_V = tl.zeros([BLOCK_V], tl.float32)
    reverse_V = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        s, slope = final_logits_and_slope(student, offs_v, V, SOFTCAP)
        t = final_logits(teacher, offs_v, V, SOFTCAP)
        p_s = tl.exp(s - top_s) * over_s
        p_t = tl.exp(t - top_t) * over_t
        r, gap_v, near, q = log_ratio(s, t, top_s, top_t, log_sums)
        # 0 * inf: an id without probability adds nothing to the mean over that side
        p_s_r = tl.where(p_s == 0.0, 0.0, p_s * r)
        p_t_r = tl.where(p_t == 0.0, 0.0, p_t * r)
        square = p_s * r * r
        d = tl.where(near, p_s * r + square * q, p_t - p_s)
        forward_V += tl.where(near, square * (1.0 - q + r * q), p_t_r - d)
        reverse_V += tl.where(near, square * q, d - p_s_r)
        if GRADIENT:
            pull = p_s * (tl.where(p_s == 0.0, 0.0, gap_v) - gap)  # p_s * (sum p_s r - r)
            gradient = tl.where(reverse == 0.0, 0.0, reverse * pull) - forward * d
            gradient += cross_entropy * (p_s - tl.where(offs_v == y, 1.0, 0.0))
            store_gradient(gradient_ptr, gradient * slope, offs_v, V)

    forward_kl = tl.sum(forward_V, 0)
    reverse_kl = tl.sum(reverse_V, 0)
    # a weight of 0 switches a part off even where it is infinite
    loss = tl.where(forward == 0.0, 0.0, forward * forward_kl)
    loss += tl.where(reverse == 0.0, 0.0, reverse * reverse_kl)
    # both terms are relative to the row's maximum: logits of 1e4 cost no digits
    surprise = tl.log(sum_s) + (top_s - s_y)
    loss += tl.where(cross_entropy == 0.0, 0.0, cross_entropy * surprise)
    C = tl.num_programs(0)
    tl.store(out_ptr + c, loss)
    tl.store(out_ptr + C + c, top_s + tl.log(sum_s))
    tl.store(out_ptr + 2 * C + c, top_t + tl.log(sum_t))
    tl.store(out_ptr + 3 * C + c, forward_kl)
    tl.store(out_ptr + 4 * C + c, reverse_kl)


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.bidirectional_kl`."""
    forward, reverse, cross_entropy = map(float, params)  # an int of 1 would be compiled in
    target_C = chunk.target_C
    if target_C is None:
        target_C = torch.empty(1, dtype=torch.int64, device=chunk.student.raw_CV.device)
    loss_C, *stats = launch_rows(
        "bidirectional_kl",
        _bidirectional_kl_kernel,
        chunk,
        5,
        target_ptr=target_C,
        forward=forward,
        reverse=reverse,
        cross_entropy=cross_entropy,
    )
    return RowResult(loss_C, tuple(stats))


VARIANTS = variants("bidirectional_kl", _bidirectional_kl_kernel)

"""Generalised Jensen-Shannon divergence, per row of logits, fused with the LM heads.

m = beta * p_t + (1 - beta) * p_s, 0 < beta < 1;
loss_n = beta * KL(p_t || m) + (1 - beta) * KL(p_s || m). With r = log p_t - log p_s and
F = log(m / p_s) = log((1 - beta) + beta * e^r):
d loss_n / d s_v = -(1 - beta) * p_s * (F_v - sum_u p_su F_u).

The ends are left out on purpose: elsewhere beta = 0 and 1 stand for the two KLs, which are not the
limits (the divergence goes to 0 at both); use `linear_bidirectional_kl`. The loss is finite for
every -inf. Elements of a block: two exp, two expm1, one log1p, about 25 passes, all in cache.
Derivation: kernels/README.md#jsd.
Shapes: N tokens, C rows of a block, V vocabulary, D and E widths of student and teacher.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_number
from bidistill_kernels._loss import (
    LinearPairOptions,
    LossModule,
    Output,
    PairOptions,
    fused_loss,
)
from bidistill_kernels._rows import row_function
from bidistill_kernels._softmax import compare_, expected
from bidistill_kernels._torch_rows import DenseResult, dense_rows
from bidistill_kernels._vocabulary import Vocabulary


def jsd_reference(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    beta: float = 0.5,
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_ends = torch.tensor([beta, 1 - beta], dtype=log_q.dtype, device=log_q.device).log()
    masked = log_p.isneginf() & log_q.isneginf()
    log_m = torch.logaddexp(log_p + log_ends[0], log_q + log_ends[1]).masked_fill(masked, 0)
    # 0 log 0 = 0: an id that a side rules out (-inf) adds nothing to the mean over that side
    teacher = log_p.exp() * (log_p - log_m).masked_fill(log_p.isneginf(), 0)
    student = log_q.exp() * (log_q - log_m).masked_fill(log_q.isneginf(), 0)
    return beta * teacher.sum(-1) + (1 - beta) * student.sum(-1)


@row_function("jsd", stats=("student_lse", "teacher_lse"), dense=True)
@dense_rows
def _rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor | None,
    target_C: Tensor | None,
    vocabulary: Vocabulary,
    params: Sequence[float],
    need_gradient: bool,
) -> DenseResult:
    assert teacher_logits_CV is not None
    (beta,) = params
    both = compare_(vocabulary, student_logits_CV, teacher_logits_CV)
    log_ratio_CV, p_s_CV, p_t_CV = both.log_ratio_CV, both.p_student_CV, both.p_teacher_CV
    # F = max(r, 0) + L with L = log1p(c expm1(-|r|)), c = beta below r = 0 and 1 - beta above:
    # log((1 - beta) + beta e^r) overflows for large r and has no digits left for small ones
    L_CV = log_ratio_CV.abs().neg_().expm1_()
    L_CV.mul_(log_ratio_CV.sign().mul_(0.5 - beta).add_(0.5)).log1p_()
    teacher_C = expected(p_t_CV, log_ratio_CV.clamp(max=0).sub_(L_CV), out=p_t_CV).sum(-1)
    p_F_CV = expected(p_s_CV, L_CV.add_(log_ratio_CV.clamp_(min=0)), out=L_CV)
    sums = vocabulary.sum(teacher_C, p_F_CV.sum(-1), both.gap_CV.sum(-1))
    teacher_C, p_F_C, gap_C = sums
    # in the sum of both parts an error of a log-sum-exp cancels to first order
    loss_C = beta * teacher_C - (1 - beta) * p_F_C
    # 0, or the NaN that `expected` took out
    nan_C = 0 * gap_C
    loss_C += nan_C
    stats = both.student_lse_C, both.teacher_lse_C
    if not need_gradient:
        return DenseResult(loss_C, None, stats)
    gradient_CV = p_s_CV.mul_((p_F_C + nan_C)[:, None]).sub_(p_F_CV).mul_(1 - beta)
    return DenseResult(loss_C, gradient_CV, stats)


def linear_jsd(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    beta: float = 0.5,
    **options: Unpack[LinearPairOptions],
) -> Output:
    """Compute beta * KL(teacher || m) + (1 - beta) * KL(student || m), per token.

    m = beta * teacher + (1 - beta) * student, with the distributions softmax(hidden @ weight.T)
    after each side's logit transform. Gradients go to the student's hidden states, weight and
    bias; the teacher is a constant.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher_hidden: the teacher's hidden states of the same tokens.
        teacher_weight: weight of the teacher's head; may be the student's.
        target: token ids; only marks ignored rows.
        beta: share of the teacher in the mixture, above 0 and below 1.
        **options: see `LinearPairOptions`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, or a trainable teacher.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation, accurate also where both models nearly agree; one downcast, of
        the gradients.
    Memory: `chunk_bytes` of logits; dX and, for a trained head, dW in fp32.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#jsd.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> linear_jsd(student, torch.eye(2), teacher, torch.eye(2))
        tensor(0.0285)
    """
    check_number("beta", beta, 0, 1, open_ends=True)
    sides = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
    return fused_loss("jsd", [float(beta)], *sides, target, **options)


def jsd(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    beta: float = 0.5,
    **options: Unpack[PairOptions],
) -> Output:
    """Compute `linear_jsd` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        teacher_logits: raw logits of the teacher.
        target: token ids; only marks ignored rows.
        beta: share of the teacher in the mixture, above 0 and below 1.
        **options: see `PairOptions`.

    Returns:
        As `linear_jsd`.

    Example:
        >>> import torch
        >>> jsd(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.0285)
    """
    check_number("beta", beta, 0, 1, open_ends=True)
    sides = (student_logits,), (teacher_logits,)
    return fused_loss("jsd", [float(beta)], *sides, target, **options)


class LinearJSD(LossModule):
    """`linear_jsd` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_jsd)

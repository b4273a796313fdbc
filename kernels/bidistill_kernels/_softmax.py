"""Softmaxes of blocks of logits and how two of them differ, in plain PyTorch and in place.

Shared by the dense losses of the torch back-end. Shapes: C rows of one block, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._vocabulary import Vocabulary


class Softmax(NamedTuple):
    """Distribution of a block."""

    p_CV: Tensor
    top_C1: Tensor  # largest logit
    log_sum_C1: Tensor  # log-sum-exp of the logits relative to it


def softmax_(vocabulary: Vocabulary, *logits_CV: Tensor) -> list[Softmax]:
    """Subtract each row's maximum from each block in place, and return their softmaxes."""
    tops_C1 = vocabulary.top(*logits_CV)
    blocks = zip(logits_CV, tops_C1, strict=True)
    ps_CV = [block_CV.sub_(top_C1).exp() for block_CV, top_C1 in blocks]
    sums_C1 = vocabulary.sum(*(p_CV.sum(-1, keepdim=True) for p_CV in ps_CV))
    triples = zip(ps_CV, tops_C1, sums_C1, strict=True)
    return [Softmax(p_CV.div_(sum_C1), top_C1, sum_C1.log()) for p_CV, top_C1, sum_C1 in triples]


class Comparison(NamedTuple):
    """Both distributions of a block, and how they differ, accurate where they hardly do."""

    p_student_CV: Tensor
    p_teacher_CV: Tensor
    log_ratio_CV: Tensor  # log p_teacher - log p_student; 0 for ids masked in both
    gap_CV: Tensor  # p_teacher - p_student
    student_top_C: Tensor  # largest logit
    student_log_sum_C: Tensor  # log-sum-exp of the logits relative to it
    student_lse_C: Tensor
    teacher_lse_C: Tensor


def compare_(
    vocabulary: Vocabulary, student_logits_CV: Tensor, teacher_logits_CV: Tensor
) -> Comparison:
    """Compare two blocks of logits; the results overwrite both of them."""
    student, teacher = softmax_(vocabulary, student_logits_CV, teacher_logits_CV)
    (p_s, top_s, log_sum_s), (p_t, top_t, log_sum_t) = student, teacher
    # logits relative to their maxima are subtracted first: lse - lse of O(10) numbers would cost
    # 2 to 12 times the error. An id masked in both models gives -inf - -inf and counts as absent
    log_ratio = teacher_logits_CV.sub_(student_logits_CV).add_(log_sum_s - log_sum_t)
    log_ratio.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    # p_t - p_s = sign(r) max(p_t, p_s) (1 - exp(-|r|)): the plain difference has no correct digit
    # left where the models agree to 1e-7, this one keeps all, and nothing overflows
    gap = torch.abs(log_ratio, out=student_logits_CV).neg_().expm1_()
    gap.mul_(torch.maximum(p_s, p_t)).copysign_(log_ratio)
    lse_s, lse_t = (top_s + log_sum_s).squeeze(1), (top_t + log_sum_t).squeeze(1)
    return Comparison(
        p_s, p_t, log_ratio, gap, top_s.squeeze(1), log_sum_s.squeeze(1), lse_s, lse_t
    )


def expected(p_CV: Tensor, value_CV: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply p and value where an impossible id (p = 0) adds 0 even at infinity.

    A NaN of the input is not hidden for long: it makes all of the row's p NaN, and with them the
    gap that every loss adds.
    """
    product_CV = torch.mul(p_CV, value_CV, out=out)
    return product_CV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

"""KL divergence between two distributions over the few outcomes that a row has chosen.

Shared by the losses on top ids, in plain PyTorch on every device: P is at most a few hundred. The
formulas are those of bidirectional KL, accurate where the models nearly agree (kernels/README.md
#bidirectional-kl). Shapes: C rows of a chunk, P outcomes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._softmax import expected


class Divergence(NamedTuple):
    """One direction of the divergence and its gradient."""

    loss_C: Tensor
    gradient_CP: Tensor  # with respect to the student's logits of the outcomes


class Comparison(NamedTuple):
    """Both distributions and how they differ."""

    p_student_CP: Tensor
    p_teacher_CP: Tensor
    log_ratio_CP: Tensor  # log p_teacher - log p_student; 0 for absent outcomes
    gap_CP: Tensor  # p_teacher - p_student

    def forward_kl(self) -> Divergence:
        """Return KL(teacher || student)."""
        loss_CP = expected(self.p_teacher_CP, self.log_ratio_CP) - self.gap_CP
        return Divergence(loss_CP.sum(-1), -self.gap_CP)

    def reverse_kl(self) -> Divergence:
        """Return KL(student || teacher)."""
        p_r_CP = expected(self.p_student_CP, self.log_ratio_CP)
        gradient_CP = self.p_student_CP * p_r_CP.sum(-1, keepdim=True) - p_r_CP
        return Divergence((self.gap_CP - p_r_CP).sum(-1), gradient_CP)


def compare(student_CP: Tensor, teacher_CP: Tensor, absent_CP: Tensor) -> Comparison:
    """Compare the softmaxes of two tables of logits; absent outcomes do not exist in either.

    A row without any outcome has divergence 0.
    """
    log_p_s_CP, log_p_t_CP = (
        # filled again: where every outcome is absent, the softmax of nothing is NaN
        x.masked_fill(absent_CP, -torch.inf).log_softmax(-1).masked_fill(absent_CP, -torch.inf)
        for x in (student_CP, teacher_CP)
    )
    r_CP = (log_p_t_CP - log_p_s_CP).masked_fill(absent_CP, 0)
    p_s_CP, p_t_CP = log_p_s_CP.exp(), log_p_t_CP.exp()
    gap_CP = torch.maximum(p_s_CP, p_t_CP) * r_CP.abs().neg_().expm1_()
    return Comparison(p_s_CP, p_t_CP, r_CP, gap_CP.copysign_(r_CP))

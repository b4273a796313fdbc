"""Push by -log(1 - p_j) at chosen ids of the student: the "bounded" reading of push-pull.

With odds q_j = p_j / (1 - p_j): d loss / d s_i = q_i [i pushed] - p_i sum_j q_j, everywhere. Only
the top id can have p > 1/2; its 1 - p is summed from the others and its own odds are never formed,
so that nothing overflows where the student is certain. Shapes: C rows, V vocabulary, K ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import Logits


class Bounded(NamedTuple):
    """Loss and the parts of its gradient: q at the pushed ids, and `others` everywhere."""

    loss_C: Tensor
    q_CK: Tensor
    top_id_C1: Tensor
    others_top_C1: Tensor  # others' part at the student's best id
    log_rest_C1: Tensor  # log-sum-exp of all ids but that one
    factor_C1: Tensor  # others' part elsewhere: minus the softmax of the rest times this

    def others(self, ids_CK: Tensor, s_CK: Tensor) -> Tensor:
        """Return the others' part at some ids of these final logits."""
        is_top_CK = ids_CK == self.top_id_C1
        # the rest may all be ruled out: -inf - -inf would be NaN
        base_C1 = self.log_rest_C1.clamp(min=torch.finfo(s_CK.dtype).min)
        p_rest_CK = (s_CK - base_C1).masked_fill(is_top_CK, 0).exp()
        return torch.where(is_top_CK, self.others_top_C1, -p_rest_CK * self.factor_C1)

    def write_others(self, student: Logits, weight: float, gradient_CV: Tensor) -> None:
        """Write the others' part times weight, except at the best id, which is ruled out."""
        factor_C = -weight * self.factor_C1.squeeze(1)
        student.softmax_gradient(self.log_rest_C1.squeeze(1), factor_C, gradient_CV)


def push_bounded(student: Logits, ids_CK: Tensor, s_CK: Tensor, pushed_CK: Tensor) -> Bounded:
    """Push some of the student's best ids, best first; rules the very best out."""
    top_id_C1, top_C1 = ids_CK[:, :1], s_CK[:, :1]
    is_top_CK = ids_CK == top_id_C1
    student.mask_(top_id_C1)
    log_rest_C1 = student.log_sum_exp()[:, None]
    lse_C1 = torch.logaddexp(top_C1, log_rest_C1)
    p_CK, p_top_C1 = (s_CK - lse_C1).exp(), (top_C1 - lse_C1).exp()
    log_not_p_CK = torch.log1p(-p_CK.masked_fill(is_top_CK, 0))
    log_not_p_CK = torch.where(is_top_CK, log_rest_C1 - lse_C1, log_not_p_CK)
    loss_C = -log_not_p_CK.masked_fill(~pushed_CK, 0).sum(-1)

    q_CK = (p_CK / (1 - p_CK.masked_fill(is_top_CK, 0))).masked_fill(~pushed_CK, 0)
    q_sum_C1 = q_CK.masked_fill(is_top_CK, 0).sum(-1, keepdim=True)
    # p_i / (1 - p_top) is a softmax over the rest: p_i * q_top = that * p_top
    factor_C1 = pushed_CK[:, :1] * p_top_C1 + (log_rest_C1 - lse_C1).exp() * q_sum_C1
    return Bounded(loss_C, q_CK, top_id_C1, -p_top_C1 * q_sum_C1, log_rest_C1, factor_C1)

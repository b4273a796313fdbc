"""One number from KL to KL, with JSDs between: the divergence as TRL and Liger have it.

Legend: N tokens, V vocabulary, D and E widths of student and teacher.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from bidistill_kernels import linear_bidirectional_kl, linear_jsd


def divergence(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    beta: float,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """The divergence of a ``beta``, of which the ends are the two KLs; TRL's and Liger's.

    Args:
        student_hidden: last hidden states, differentiable.
        student_weight: the student's LM head.
        teacher_hidden: constants.
        teacher_weight: constant.
        beta: 0: KL(teacher || student); 1: KL(student || teacher); between: the JSD whose mixture
            holds a share ``beta`` of the teacher.
        **options: those of `bidistill_kernels.linear_jsd`, ``target`` too.

    Returns:
        As `bidistill_kernels.linear_jsd`.
    """
    tensors = student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach()
    if beta in (0, 1):
        return linear_bidirectional_kl(*tensors, forward=1.0 - beta, reverse=float(beta), **options)
    return linear_jsd(*tensors, beta=beta, **options)

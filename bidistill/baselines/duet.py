"""DUET: pull the logits of the teacher's best ids, push nothing.

loss_n = sum over the teacher's k best ids of Huber(s_i - t_i): ``push_pull`` with a push of weight
0. DUET reads the first position of an answer alone: ``positions: first`` in the recipe.
Source: arXiv:2601.21283, equation 3; its k and the threshold of Huber's loss are not known to us.
"""

from typing import Any

from jaxtyping import Float, Integer
from torch import Tensor

from bidistill_kernels import linear_push_pull


def linear_duet(
    student_hidden: Float[Tensor, "N H"],
    student_weight: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, " N"] | None = None,
    *,
    k: int = 10,
    delta: float = 1.0,
    **common: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Match the student's logits to the teacher's at the teacher's best ids, per token.

    Args:
        student_hidden: last hidden states.
        student_weight: the student's LM head.
        teacher_hidden: last hidden states of the teacher.
        teacher_weight: the teacher's LM head.
        target: token ids; only marks ignored rows.
        k: ids of the teacher that count.
        delta: threshold of Huber's loss.
        **common: options of all losses.

    Returns:
        As `bidistill_kernels.linear_push_pull`.

    Raises:
        ValueError: an argument of the wrong shape or range.
    """
    sides = student_hidden, student_weight, teacher_hidden, teacher_weight, target
    try:
        return linear_push_pull(*sides, k_pull=k, delta=delta, push_weight=0.0, **common)
    except ValueError as error:  # by the name that the recipe has
        raise ValueError(str(error).replace("k_pull:", "k:", 1)) from None

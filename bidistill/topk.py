"""The loss ``topk_kl`` where the teacher's hidden rows are at hand: its best ids are chosen here.

Where a store of best ids is read instead (``teacher.cache: topk``), the kernels' own
``linear_topk_kl`` is called with them.

Legend: N answer rows, H and E hidden widths of student and teacher, V vocabulary.
"""

from typing import Any, Literal

from jaxtyping import Float, Integer
from torch import Tensor

from bidistill_kernels import LogitTransform, linear_topk_kl, topk_log_probs

K = 64
"""Ids of a row, where nobody asks for another number."""


def topk_kl(
    student_hidden: Float[Tensor, "N H"],
    student_weight: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, " N"] | None = None,
    *,
    k: int | None = None,
    forward: float = 1.0,
    reverse: float = 0.0,
    tail: Literal["bucket", "renormalize"] = "bucket",
    **common: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Weigh forward and reverse KL over the teacher's k best ids, in the form that losses share.

    Args:
        student_hidden: last hidden states.
        student_weight: the student's LM head.
        teacher_hidden: last hidden states of the teacher.
        teacher_weight: the teacher's LM head.
        target: token ids; only marks ignored rows.
        k: ids that count; None: ``K``.
        forward: weight of KL(teacher || student).
        reverse: weight of KL(student || teacher).
        tail: what becomes of the other ids, as in `bidistill_kernels.linear_topk_kl`.
        **common: options of all losses; those of the teacher go into the choice.

    Returns:
        As `bidistill_kernels.linear_topk_kl`.

    Raises:
        ValueError: an argument of the wrong shape or range.
    """
    teacher = topk_log_probs(
        teacher_hidden,
        teacher_weight,
        K if k is None else k,
        teacher_bias=common.pop("teacher_bias", None),
        transform=common.pop("teacher_transform", LogitTransform()),
        chunk_bytes=common.get("chunk_bytes"),
    )
    weights = {"forward": forward, "reverse": reverse, "tail": tail}
    return linear_topk_kl(student_hidden, student_weight, teacher, target, **weights, **common)

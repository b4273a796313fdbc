"""One call of a loss, on the rows of the roles that share it.

Legend: N rows of the call, H hidden width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bidistill.baselines.answers import Answers
from bidistill.losses import Loss
from bidistill_kernels import LogitTransform, TopK, linear_cross_entropy, linear_topk_kl


class Side(NamedTuple):
    """What one model gives."""

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"] | None
    """Of the LM head; None where the rows are those of a layer."""
    bias: Float[Tensor, " V"] | None
    transform: LogitTransform


class Rows(NamedTuple):
    """What is known of the rows; all on the device of the hidden states but `sequence`."""

    target: Int64[Tensor, " N"]
    weight: Float[Tensor, " N"]
    """Factor on the loss of each row; that of a role, so alike within a sequence."""
    sequence: Int64[Tensor, " N"]
    """Number of the sequence of each row, ascending; on the CPU."""


def run(
    loss: Loss,
    options: Mapping[str, Any],
    student: Side,
    teacher: Side | TopK | None,
    rows: Rows,
    chunk_bytes: int | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """Run a loss.

    Args:
        loss: which.
        options: its own, checked.
        student: differentiable.
        teacher: constants; its best ids for ``topk_kl`` alone; None for a loss without one.
        rows: what they are.
        chunk_bytes: of logits that a fused call holds at a time; None: its own choice.

    Returns:
        The weighted sum over rows, and the unweighted loss of each row, detached, in fp64.
    """
    if loss.reads == "head":
        return _fused(loss, options, student, teacher, rows, chunk_bytes)
    assert not isinstance(teacher, TopK), "needs the teacher's hidden rows"
    if loss.reads == "layer":
        assert teacher is not None, "needs the teacher's rows"
        per_row = loss.function(student.hidden, teacher.hidden, **options)
    else:
        nll, base_nll = _likelihood(student, rows, chunk_bytes), None
        if teacher is not None:
            with torch.no_grad():
                base_nll = _likelihood(teacher, rows, chunk_bytes)
        per_row = loss.function(Answers.of(nll, base_nll, rows.sequence), **options)
    return (per_row * rows.weight).sum(), per_row.detach().double()


def _fused(
    loss: Loss,
    options: Mapping[str, Any],
    student: Side,
    teacher: Side | TopK | None,
    rows: Rows,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """One call with the LM head."""
    function, keywords = loss.function, dict(options)
    given: list[Any] = [student.hidden, student.weight]
    if isinstance(teacher, TopK):
        function = linear_topk_kl
        keywords.pop("k", None)  # as many as there are
        given.append(teacher)
    elif teacher is not None:
        given += [teacher.hidden, teacher.weight]
        keywords |= {"teacher_bias": teacher.bias, "teacher_transform": teacher.transform}
    given.append(rows.target)
    total, stats = function(
        *given,
        student_bias=student.bias,
        student_transform=student.transform,
        token_weight=rows.weight,
        reduction="sum",
        return_stats=True,
        chunk_bytes=chunk_bytes,
        **keywords,
    )
    return total, stats.per_token.detach().double()


def _likelihood(side: Side, rows: Rows, chunk_bytes: int | None) -> Tensor:
    """-log p of each target token, nats, without its logits."""
    assert side.weight is not None, "a likelihood needs the LM head"
    return linear_cross_entropy(
        side.hidden,
        side.weight,
        rows.target,
        student_bias=side.bias,
        student_transform=side.transform,
        reduction="none",
        chunk_bytes=chunk_bytes,
    )

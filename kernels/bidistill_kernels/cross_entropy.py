"""Cross-entropy of one model against target ids, per row of logits, fused with the LM head.

loss_n = logsumexp(s_n) - s_ny with y = target_n;  d loss_n / d s_nv = p_nv - [v = y].
Ignored rows are left out by the driver; a target of logit -inf has infinite loss.
Elements of a block: read 4 times, written 3 times, one exp each.
Shapes: N tokens, C rows of a block, V vocabulary, D width.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_target
from bidistill_kernels._loss import (
    LinearRowOptions,
    LossModule,
    Output,
    RowOptions,
    fused_loss,
)
from bidistill_kernels._rows import row_function
from bidistill_kernels._softmax import softmax_
from bidistill_kernels._torch_rows import DenseResult, dense_rows
from bidistill_kernels._vocabulary import Vocabulary


def cross_entropy_reference(
    student_logits: Float[Tensor, "N V"], target: Integer[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    return F.cross_entropy(student_logits, target.long(), reduction="none")


@row_function("cross_entropy", stats=("student_lse",), dense=True)
@dense_rows
def _rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor | None,
    target_C: Tensor | None,
    vocabulary: Vocabulary,
    params: Sequence[float],
    need_gradient: bool,
) -> DenseResult:
    assert target_C is not None
    target_C = target_C.long()
    ((p_CV, top_C1, log_sum_C1),) = softmax_(vocabulary, student_logits_CV)
    lse_C = (top_C1 + log_sum_C1).squeeze(1)
    # both terms are relative to the row's maximum: logits of 1e4 cost no digits
    (label_C,) = vocabulary.sum(vocabulary.label(student_logits_CV, target_C))
    loss_C = log_sum_C1.squeeze(1) - label_C
    if not need_gradient:
        return DenseResult(loss_C, None, (lse_C,))
    vocabulary.add_label_(p_CV, target_C, -1)
    return DenseResult(loss_C, p_CV, (lse_C,))


def linear_cross_entropy(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    target: Integer[Tensor, "N"],
    **options: Unpack[LinearRowOptions],
) -> Output:
    """Cross-entropy of the target ids under softmax(student_hidden @ student_weight.T).

    loss_n = logsumexp_v(s_nv) - s_ny, s = final logits, y = target_n.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the LM head.
        target: token ids; rows equal to `ignore_index` are left out.
        **options: see `LinearRowOptions`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, as the message words it.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation; one downcast, of the gradients.
    Memory: `chunk_bytes` of logits; dX and, for a trained head, dW in fp32.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#cross-entropy.

    Example:
        >>> import torch
        >>> hidden, head = torch.tensor([[0.0, 0.0]]), torch.eye(2)
        >>> linear_cross_entropy(hidden, head, torch.tensor([1]))
        tensor(0.6931)
    """
    check_target(target)
    sides = (student_hidden, student_weight), None
    return fused_loss("cross_entropy", [], *sides, target, **options)


def cross_entropy(
    student_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"],
    **options: Unpack[RowOptions],
) -> Output:
    """Compute `linear_cross_entropy` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        target: token ids.
        **options: see `RowOptions`.

    Returns:
        As `linear_cross_entropy`.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """
    check_target(target)
    return fused_loss("cross_entropy", [], (student_logits,), None, target, **options)


class LinearCrossEntropy(LossModule):
    """`linear_cross_entropy` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_cross_entropy)

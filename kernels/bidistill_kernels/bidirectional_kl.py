"""Forward and reverse KL and cross-entropy in one pass over the vocabulary.

loss_n = forward * KL(p_t || p_s) + reverse * KL(p_s || p_t) + cross_entropy * -log p_s[y],
p_s, p_t = softmax of student's and teacher's final logits s, t, y = target_n. With
r = log p_t - log p_s: d loss_n / d s_v =
    forward * (p_s - p_t) + reverse * p_s * (KL(p_s || p_t) - r) + cross_entropy * (p_s - [v = y]).

An id the teacher rules out (t = -inf) adds nothing to the forward part and makes the reverse part
infinite if the student gives it any probability; an id masked in both models is absent.
Elements of a block: two exp, one expm1, about 20 passes, all in cache. Derivation and accuracy:
kernels/README.md#bidirectional-kl.
Shapes: N tokens, C rows of a block, V vocabulary, D and E widths of student and teacher.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_number, check_target
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


def bidirectional_kl_reference(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 0.5,
    reverse: float = 0.5,
    cross_entropy: float = 0.0,
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    loss = student_logits.new_zeros(student_logits.shape[0])
    # 0 log 0 = 0: an id that a side rules out (-inf) adds nothing to the mean over that side
    if forward:
        log_ratio = (log_p - log_q).masked_fill(log_p.isneginf(), 0)
        loss = loss + forward * (log_p.exp() * log_ratio).sum(-1)
    if reverse:
        log_ratio = (log_q - log_p).masked_fill(log_q.isneginf(), 0)
        loss = loss + reverse * (log_q.exp() * log_ratio).sum(-1)
    if cross_entropy:
        assert target is not None
        loss = loss - cross_entropy * log_q.gather(-1, target.long()[:, None]).squeeze(-1)
    return loss


@row_function(
    "bidirectional_kl", stats=("student_lse", "teacher_lse", "forward_kl", "reverse_kl"), dense=True
)
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
    forward, reverse, cross_entropy = params
    label = ()
    if cross_entropy:
        assert target_C is not None
        target_C = target_C.long()
        label = (vocabulary.label(student_logits_CV, target_C),)
    both = compare_(vocabulary, student_logits_CV, teacher_logits_CV)
    # sum p r is a difference of O(1) numbers; with the gap the sums become those of
    # p_t (r + e^-r - 1) and p_s (e^r - 1 - r): not negative, and off by r^2 where r is off by r
    p_t_r_C = expected(both.p_teacher_CV, both.log_ratio_CV, out=both.p_teacher_CV).sum(-1)
    p_r_CV = expected(both.p_student_CV, both.log_ratio_CV, out=both.log_ratio_CV)
    sums = vocabulary.sum(both.gap_CV.sum(-1), p_t_r_C, p_r_CV.sum(-1), *label)
    gap_C, p_t_r_C, p_r_C, *label = sums
    forward_C, reverse_C = p_t_r_C - gap_C, gap_C - p_r_C
    # a weight of 0 switches a part off even where it is infinite
    parts = [w * part for w, part in ((forward, forward_C), (reverse, reverse_C)) if w]
    loss_C = sum(parts, torch.zeros_like(gap_C))
    for label_logit_C in label:
        # relative to the row's maximum: logits of 1e4 cost no digits
        below_top_C = both.student_top_C - label_logit_C
        loss_C += cross_entropy * (both.student_log_sum_C + below_top_C)
    stats = both.student_lse_C, both.teacher_lse_C, forward_C, reverse_C
    if not need_gradient:
        return DenseResult(loss_C, None, stats)
    gradient_CV = both.gap_CV.mul_(-forward)
    if reverse:
        gradient_CV.sub_(p_r_CV, alpha=reverse)
        gradient_CV.addcmul_(both.p_student_CV, p_r_C[:, None], value=reverse)
    if cross_entropy and target_C is not None:
        gradient_CV.add_(both.p_student_CV, alpha=cross_entropy)
        vocabulary.add_label_(gradient_CV, target_C, -cross_entropy)
    return DenseResult(loss_C, gradient_CV, stats)


def _params(
    forward: float, reverse: float, cross_entropy: float, target: Tensor | None
) -> list[float]:
    weights = {"forward": forward, "reverse": reverse, "cross_entropy": cross_entropy}
    for name, weight in weights.items():
        check_number(name, weight, 0)
    if not any(weights.values()):
        raise ValueError("forward: got weights that are all 0, expected at least one above 0")
    if cross_entropy:
        check_target(target)
    return [float(weight) for weight in weights.values()]


def linear_bidirectional_kl(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 0.5,
    reverse: float = 0.5,
    cross_entropy: float = 0.0,
    **options: Unpack[LinearPairOptions],
) -> Output:
    """Weigh forward KL, reverse KL and cross-entropy of each token in one pass.

    loss_n = forward * KL(teacher || student) + reverse * KL(student || teacher)
    + cross_entropy * -log student[target], with the distributions softmax(hidden @ weight.T) after
    each side's logit transform. Gradients go to the student's hidden states, weight and bias; the
    teacher is a constant.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher_hidden: the teacher's hidden states of the same tokens.
        teacher_weight: weight of the teacher's head; may be the student's.
        target: token ids; needed for cross-entropy, else it only marks ignored rows.
        forward: weight of KL(teacher || student), which spreads the student over the teacher.
        reverse: weight of KL(student || teacher), which pulls down what only the student likes.
        cross_entropy: weight of the cross-entropy of `target`.
        **options: see `LinearPairOptions`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, a trainable teacher, or no target
            where cross-entropy needs one.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation, accurate also where both models nearly agree; one downcast, of
        the gradients.
    Memory: `chunk_bytes` of logits; dX and, for a trained head, dW in fp32.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#bidirectional-kl.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> linear_bidirectional_kl(student, torch.eye(2), teacher, torch.eye(2), reverse=0.0)
        tensor(0.0555)
    """
    return fused_loss(
        "bidirectional_kl",
        _params(forward, reverse, cross_entropy, target),
        (student_hidden, student_weight),
        (teacher_hidden, teacher_weight),
        target,
        **options,
    )


def bidirectional_kl(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 0.5,
    reverse: float = 0.5,
    cross_entropy: float = 0.0,
    **options: Unpack[PairOptions],
) -> Output:
    """Compute `linear_bidirectional_kl` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        teacher_logits: raw logits of the teacher.
        target: token ids, as in `linear_bidirectional_kl`.
        forward: weight of KL(teacher || student).
        reverse: weight of KL(student || teacher).
        cross_entropy: weight of the cross-entropy of `target`.
        **options: see `PairOptions`.

    Returns:
        As `linear_bidirectional_kl`.

    Example:
        >>> import torch
        >>> bidirectional_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), reverse=0.0)
        tensor(0.0555)
    """
    params = _params(forward, reverse, cross_entropy, target)
    sides = (student_logits,), (teacher_logits,)
    return fused_loss("bidirectional_kl", params, *sides, target, **options)


class LinearBidirectionalKL(LossModule):
    """`linear_bidirectional_kl` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_bidirectional_kl)

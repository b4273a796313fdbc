"""KL divergence to a teacher of which the probabilities themselves are given, fused with the head.

loss_n = sum_v q_nv (log max(q_nv, eps) - log p_nv), p = softmax of the student's final logits;
d loss_n / d s_v = p_v * sum_u q_nu - q_v.

The rows q are used as they are, whatever they add up to: probabilities rounded to 16 bits add up to
1 give or take a few thousandths, and renormalising them would be another loss. So a teacher whose
logits or hidden states are at hand is better given as these (`bidirectional_kl.py`), which is also
accurate where both models nearly agree. An id with q = 0 adds nothing, even if the student rules it
out.

The driver copies a chunk of the probabilities to fp32 as it does with logits, and the row function
of each back-end is given both. Elements of a block in PyTorch: one exp, one log, about 12 passes.
Derivation: kernels/README.md#kl-to-probabilities.
Shapes: N tokens, C rows of a block, V vocabulary, D width.
"""

from collections.abc import Sequence

from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_number
from bidistill_kernels._loss import LinearRowOptions, LossModule, Output, fused_loss
from bidistill_kernels._rows import row_function
from bidistill_kernels._softmax import expected, softmax_
from bidistill_kernels._torch_rows import DenseResult, dense_rows
from bidistill_kernels._vocabulary import Vocabulary


def kl_to_probs_reference(
    student_logits: Float[Tensor, "N V"],
    teacher_probs: Float[Tensor, "N V"],
    *,
    eps: float = 1e-10,
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    log_ratio = teacher_probs.clamp(min=eps).log() - student_logits.log_softmax(-1)
    # 0 log 0 = 0, also where the student rules the id out
    return (teacher_probs * log_ratio.masked_fill(teacher_probs == 0, 0)).sum(-1)


@row_function("kl_to_probs", stats=("student_lse",), dense=True)
@dense_rows
def _rows(
    student_logits_CV: Tensor,
    teacher_probs_CV: Tensor | None,
    target_C: Tensor | None,
    vocabulary: Vocabulary,
    params: Sequence[float],
    need_gradient: bool,
) -> DenseResult:
    assert teacher_probs_CV is not None
    (eps,) = params
    q_CV = teacher_probs_CV
    ((p_CV, top_C1, log_sum_C1),) = softmax_(vocabulary, student_logits_CV)
    log_ratio_CV = q_CV.clamp(min=eps).log_().sub_(student_logits_CV.sub_(log_sum_C1))
    mass_C1 = q_CV.sum(-1, keepdim=True)
    loss_C = expected(q_CV, log_ratio_CV, out=log_ratio_CV).sum(-1)
    # 0, or the NaN that `expected` took out
    nan_C1 = 0 * (mass_C1 + p_CV.sum(-1, keepdim=True))
    loss_C += nan_C1.squeeze(1)
    stats = ((top_C1 + log_sum_C1).squeeze(1),)
    if not need_gradient:
        return DenseResult(loss_C, None, stats)
    return DenseResult(loss_C, p_CV.mul_(mass_C1 + nan_C1).sub_(q_CV), stats)


def linear_kl_to_probs(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_probs: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    eps: float = 1e-10,
    **options: Unpack[LinearRowOptions],
) -> Output:
    """Compute sum_v q (log q - log p) of each token, q = teacher_probs as given.

    p = softmax(student_hidden @ student_weight.T) after the student's logit transform; a
    temperature there is not applied to q. Gradients go to the student's hidden states, weight and
    bias.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher_probs: the teacher's probabilities, any float type; not renormalised.
        target: token ids; only marks ignored rows.
        eps: lower bound of q inside its logarithm.
        **options: see `LinearRowOptions`; there is no `vocab_parallel`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, or a trainable teacher.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation; one downcast, of the gradients. Where the student nearly agrees
        the loss is a difference of entropies and has their absolute error.
    Memory: `chunk_bytes` of logits and probabilities; dX and, for a trained head, dW in fp32.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#kl-to-probabilities.

    Example:
        >>> import torch
        >>> probs = torch.tensor([[0.5, 0.5]])
        >>> linear_kl_to_probs(torch.tensor([[1.0, 0.0]]), torch.eye(2), probs)
        tensor(0.1201)
    """
    check_number("eps", eps, 0)
    sides = (student_hidden, student_weight), (teacher_probs,)
    return fused_loss("kl_to_probs", [float(eps)], *sides, target, **options)


class LinearKLToProbs(LossModule):
    """`linear_kl_to_probs` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_kl_to_probs)

"""BiLD: the differences between the logits of top ids, compared both ways, per row.

Of the k top ids of one model, best first: d_ab = (z_a - z_b) / temperature for all k (k - 1) / 2
pairs a < b, from the student's final logits (d_s) and the teacher's (d_t); p = softmax of d over
the pairs;

loss_n = KL(p_t || p_s) on the teacher's top ids + KL(p_t || p_s) on the student's top ids.

The ids are constants. d loss / d d_s = p_s - p_t for each pair, so an id collects, over
temperature, that of the pairs it leads minus that of the pairs it closes, and the gradient is
sparse: 2 k ids a row. Only differences count, not a constant added to one model's logits. Pairs
with an id masked (-inf) in either model are absent: a difference to -inf says nothing. Exactly k
ids are taken, lowest id first on ties. Elements of a row: two top-k passes and some tables (K, K).
Source: BiLD (Li et al. 2024), section 3. Derivation: kernels/README.md#bild.
Shapes: N tokens, C rows of a chunk, V vocabulary, K ids, D and E widths of student and teacher.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_number
from bidistill_kernels._loss import (
    LinearPairOptions,
    LossModule,
    Output,
    PairOptions,
    fused_loss,
)
from bidistill_kernels._outcomes import compare
from bidistill_kernels._rows import (
    Chunk,
    Logits,
    RowResult,
    SparseGradient,
    TopK,
    row_function,
)


def bild_reference(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k: int = 8,
    temperature: float = 3.0,
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    k = min(k, student_logits.shape[-1])
    # all pairs a < b; the ids come best first, so that a is the leader's better one
    a, b = torch.triu_indices(k, k, offset=1, device=student_logits.device)
    loss = student_logits.new_zeros(student_logits.shape[0])
    for leader in (teacher_logits, student_logits):
        ids = leader.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        s, t = (logits.gather(1, ids) / temperature for logits in (student_logits, teacher_logits))
        masked = s.isneginf() | t.isneginf()
        absent = masked[:, a] | masked[:, b]
        log_q, log_p = (
            (z[:, a] - z[:, b]).masked_fill(absent, -torch.inf).log_softmax(-1) for z in (s, t)
        )
        log_ratio = (log_p - log_q).masked_fill(absent, 0)
        loss = loss + (log_p.exp().masked_fill(absent, 0) * log_ratio).sum(-1)
    return loss


def _differences(z_CK: Tensor, masked_CK: Tensor, temperature: float) -> Tensor:
    """All z_a - z_b over temperature, less a constant of the row, which a softmax does not see.

    Relative to the best and the worst id the small differences beside one of 1e4 keep their digits.
    """
    best_C1 = z_CK.masked_fill(masked_CK, -torch.inf).amax(-1, keepdim=True)
    worst_C1 = z_CK.masked_fill(masked_CK, torch.inf).amin(-1, keepdim=True)
    d_CKK = (z_CK - best_C1)[:, :, None] - (z_CK - worst_C1)[:, None, :]
    return d_CKK.flatten(1) / temperature


def _led(
    student: Logits, teacher: Logits, ids_CK: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss on the ids of one leader, and its derivative at these ids."""
    s_CK, t_CK = student.at(ids_CK), teacher.at(ids_CK)
    masked_CK = s_CK.isneginf() | t_CK.isneginf()
    # the full square, of which the strict upper triangle exists: the sums over its rows and columns
    # are the gradient, where a list of pairs would have to be scattered
    K = ids_CK.shape[1]
    pair_KK = torch.ones(K, K, dtype=torch.bool, device=ids_CK.device).triu(1)
    absent_CKK = masked_CK[:, :, None] | masked_CK[:, None, :] | ~pair_KK
    d_s_CP, d_t_CP = (_differences(z_CK, masked_CK, temperature) for z_CK in (s_CK, t_CK))
    loss_C, gradient_CP = compare(d_s_CP, d_t_CP, absent_CKK.flatten(1)).forward_kl()
    gradient_CKK = gradient_CP.view_as(absent_CKK) / temperature
    return loss_C, student.chain(gradient_CKK.sum(2) - gradient_CKK.sum(1), s_CK)


def _width(params: Sequence[float], V: int, K: int) -> int:
    """Ids of a row's gradient: both models' choice."""
    return 2 * min(int(params[0]), V)


@row_function("bild", width=_width)
def _rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    student, teacher = chunk.student, chunk.teacher
    assert teacher is not None
    assert not isinstance(teacher, TopK)
    k, temperature = params
    choices = teacher.top(int(k)), student.top(int(k))
    led = [_led(student, teacher, ids_CK, temperature) for ids_CK in choices]
    loss_C = led[0][0] + led[1][0]
    if not chunk.need_gradient:
        return RowResult(loss_C)
    values_CK = torch.cat([values_CK for _, values_CK in led], dim=1)
    return RowResult(loss_C, sparse=SparseGradient(torch.cat(choices, dim=1), values_CK))


def _params(k: int, temperature: float) -> list[float]:
    check_number("k", k, 2, whole=True)
    check_number("temperature", temperature, 0, open_ends=True)
    return [float(k), float(temperature)]


def linear_bild(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k: int = 8,
    temperature: float = 3.0,
    **options: Unpack[LinearPairOptions],
) -> Output:
    """Compare how far apart the models put their top ids: BiLD, per token.

    Sum of two KL(p_t || p_s), on the teacher's and on the student's k top ids, where p is the
    softmax of all pairwise differences of one model's final logits over temperature. Gradients go
    to the student's hidden states, weight and bias; the teacher is a constant.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher_hidden: the teacher's hidden states of the same tokens.
        teacher_weight: weight of the teacher's head; may be the student's.
        target: token ids; only marks ignored rows.
        k: number of each model's ids to compare; more than the vocabulary means all; 2 make one
            pair, on which any two models agree.
        temperature: divisor of the differences, on top of that of a logit transform.
        **options: see `LinearPairOptions`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, or a trainable teacher.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation, accurate also where both models nearly agree; one downcast, of
        the gradients.
    Memory: `chunk_bytes` of logits and about ten tables of k^2 numbers a row of them; dX and, for
        a trained head, dW.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#bild.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[3.0, 0.0, 0.0]])
        >>> linear_bild(student, torch.eye(3), teacher, torch.eye(3), k=3, temperature=1.0)
        tensor(4.2025)
    """
    params = _params(k, temperature)
    sides = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
    return fused_loss("bild", params, *sides, target, **options)


def bild(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k: int = 8,
    temperature: float = 3.0,
    **options: Unpack[PairOptions],
) -> Output:
    """Compute `linear_bild` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        teacher_logits: raw logits of the teacher.
        target: token ids; only marks ignored rows.
        k: number of each model's ids to compare.
        temperature: divisor of the differences.
        **options: see `PairOptions`.

    Returns:
        As `linear_bild`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[3.0, 0.0, 0.0]])
        >>> bild(student, teacher, k=3, temperature=1.0)
        tensor(4.2025)
    """
    params = _params(k, temperature)
    return fused_loss("bild", params, (student_logits,), (teacher_logits,), target, **options)


class LinearBiLD(LossModule):
    """`linear_bild` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_bild)

"""KL divergence to a teacher of which the top ids were stored, per row, fused with the LM head.

The teacher is `TopK`: K ids a row and their log-probabilities. Over the outcomes chosen below,
loss_n = forward * KL(p_t || p_s) + reverse * KL(p_s || p_t), and with r = log p_t - log p_s
d loss_n / d (log p_s) = forward * (p_s - p_t) + reverse * p_s * (sum_u p_su r_u - r).

tail         outcomes                                        gradient at an id outside
renormalize  the K ids alone, both sides renormalised        0: nothing else is even projected
bucket       the K ids, and one more for all other ids       p_v / r_s * that of the bucket

r_t = 1 - sum of the stored probabilities is at least 1e-6, which is what fp32 log-probabilities
tell from 0; the student's r_s is a sum of its own, over the other ids, never 1 - sum. Where the
student gives the others nothing and r_t is at that floor (K = V, padding masked in both), there is
no bucket. A KL cut off at K ids without either would not be one: it goes negative.
A value of -inf marks an absent entry, whose id means nothing; the ids of a row's other entries
differ, and one that does not exist makes the row NaN. An id that the student masks (-inf) makes the
forward part infinite; a part of weight 0 is left out even then.
Elements of a row: K gathered products, or for "bucket" one log-sum-exp and one exp of the
vocabulary. Derivation: kernels/README.md#top-k-kl.
Shapes: N tokens, C rows of a chunk, V vocabulary, K ids, D and E widths of student and teacher.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels import _ops
from bidistill_kernels._checks import (
    Side,
    check_choice,
    check_number,
    check_side,
    check_weight,
)
from bidistill_kernels._loss import (
    LinearRowOptions,
    LossModule,
    Output,
    RowOptions,
    as_autocast,
    fused_loss,
    settings,
)
from bidistill_kernels._outcomes import compare
from bidistill_kernels._rows import (
    Chunk,
    RowResult,
    SparseGradient,
    TopK,
    row_function,
)
from bidistill_kernels._stored import Stored
from bidistill_kernels.transform import LogitTransform

Tail: TypeAlias = Literal["bucket", "renormalize"]

# Smallest probability of a teacher's tail: the stored ones add up to 1 with an error of a few 1e-7
TAIL_FLOOR = 1e-6


def topk_kl_reference(
    student_logits: Float[Tensor, "N V"],
    teacher: TopK,
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 1.0,
    reverse: float = 0.0,
    tail: Tail = "bucket",
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""
    all_log_q = student_logits.log_softmax(-1)
    absent = teacher.values.isneginf()
    log_q = all_log_q.gather(1, teacher.ids.masked_fill(absent, 0))
    log_p = teacher.values.to(all_log_q.dtype)
    if tail == "bucket":
        N, V = student_logits.shape
        # an absent entry marks a column that is cut off
        chosen = torch.zeros(N, V + 1, dtype=torch.bool, device=student_logits.device)
        chosen = chosen.scatter(1, teacher.ids.masked_fill(absent, V), value=True)[:, :V]
        rest_q = all_log_q.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True)
        rest_p = (-log_p.logsumexp(-1, keepdim=True).expm1()).clamp(min=TAIL_FLOOR)
        absent = torch.cat([absent, rest_q.isneginf() & (rest_p <= TAIL_FLOOR)], dim=1)
        log_q, log_p = torch.cat([log_q, rest_q], dim=1), torch.cat([log_p, rest_p.log()], dim=1)
    log_q, log_p = (x.masked_fill(absent, -torch.inf).log_softmax(-1) for x in (log_q, log_p))
    loss = student_logits.new_zeros(student_logits.shape[0])
    for weight, log_a, log_b in ((forward, log_p, log_q), (reverse, log_q, log_p)):
        if weight:
            # 0 log 0 = 0; and where nothing is stored and there is no bucket, nothing is compared
            nothing = absent | log_a.isneginf()
            ratio = (log_a - log_b).masked_fill(nothing, 0)
            loss = loss + weight * (log_a.exp().masked_fill(nothing, 0) * ratio).sum(-1)
    return loss


class Part(NamedTuple):
    """Loss of each row over its outcomes, its gradient there, and the two divergences."""

    loss_C: Tensor
    gradient_CP: Tensor
    stats: tuple[Tensor, Tensor]


def _weigh(
    student_CP: Tensor, teacher_CP: Tensor, absent_CP: Tensor, params: Sequence[float]
) -> Part:
    both = compare(student_CP, teacher_CP, absent_CP)
    kinds = both.forward_kl(), both.reverse_kl()
    loss_C, gradient_CP = torch.zeros_like(kinds[0].loss_C), torch.zeros_like(both.gap_CP)
    for weight, kind in zip(params, kinds, strict=True):
        # a weight of 0 switches a part off even where it is infinite
        if weight:
            loss_C.add_(kind.loss_C, alpha=weight)
            gradient_CP.add_(kind.gradient_CP, alpha=weight)
    return Part(loss_C, gradient_CP, (kinds[0].loss_C, kinds[1].loss_C))


def _stored_ids(params: Sequence[float], V: int, K: int) -> int:
    """Ids of a row's gradient."""
    return K


@row_function(
    "topk_kl_renormalize", stats=("forward_kl", "reverse_kl"), width=_stored_ids, gathers=True
)
def _renormalized_rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    assert isinstance(chunk.teacher, TopK)
    stored = Stored.read(chunk.teacher)
    s_CK = chunk.student.at(stored.ids_CK)
    part = _weigh(s_CK, stored.values_CK.to(s_CK.dtype), stored.absent_CK, params)
    if not chunk.need_gradient:
        return RowResult(part.loss_C, part.stats)
    # that of an absent entry is 0 and may go to the id it copies
    values_CK = chunk.student.chain(part.gradient_CP, s_CK)
    return RowResult(part.loss_C, part.stats, SparseGradient(stored.ids_CK, values_CK))


@row_function("topk_kl_bucket", stats=("student_lse", "forward_kl", "reverse_kl"))
def _bucket_rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    student = chunk.student
    assert isinstance(chunk.teacher, TopK)
    stored = Stored.read(chunk.teacher)
    s_CK = student.at(stored.ids_CK)
    student.mask_(stored.ids_CK)
    log_rest_C = student.log_sum_exp()
    rest_s_C1, log_p_CK = log_rest_C[:, None], stored.values_CK.to(s_CK.dtype)
    rest_t_C1 = log_p_CK.logsumexp(-1, keepdim=True).expm1_().neg_().clamp_(min=TAIL_FLOOR)
    no_bucket_C1 = rest_s_C1.isneginf() & (rest_t_C1 <= TAIL_FLOOR)
    part = _weigh(
        torch.cat([s_CK, rest_s_C1], dim=1),
        torch.cat([log_p_CK, rest_t_C1.log_()], dim=1),
        torch.cat([stored.absent_CK, no_bucket_C1], dim=1),
        params,
    )
    chosen_C = s_CK.masked_fill(stored.absent_CK, -torch.inf).logsumexp(-1)
    stats = torch.logaddexp(log_rest_C, chosen_C), *part.stats
    if chunk.need_gradient:
        assert chunk.gradient_CV is not None
        student.softmax_gradient(log_rest_C, part.gradient_CP[:, -1], chunk.gradient_CV)
        values_CK = student.chain(part.gradient_CP[:, :-1], s_CK).gather(1, stored.source_CK)
        chunk.gradient_CV.scatter_(1, stored.ids_CK, values_CK.to(chunk.gradient_CV.dtype))
    return RowResult(part.loss_C, stats)


def _checked(teacher: object) -> TopK:
    if not isinstance(teacher, TopK):
        raise TypeError(
            f"teacher: got {type(teacher).__name__}, expected TopK(ids, values); "
            "topk_log_probs makes one"
        )
    return teacher


def topk_log_probs(
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    k: int,
    *,
    teacher_bias: Float[Tensor, "V"] | None = None,
    transform: LogitTransform = LogitTransform(),  # noqa: B008  (frozen)
    chunk_bytes: int | None = None,
    backend: Literal["auto", "torch", "triton", "native"] = "auto",
) -> TopK:
    """Return a teacher's k best ids of each token and their log-probabilities, to be stored.

    The log-probabilities are those of the whole vocabulary: what `linear_topk_kl` takes. Nothing
    of size N x V is built, and no gradient flows.

    Args:
        teacher_hidden: last hidden states, any float type.
        teacher_weight: weight of the teacher's LM head.
        k: number of ids to keep; more than the vocabulary means all.
        teacher_bias: bias of the head; -inf masks an id, unless a soft-cap makes it finite.
        transform: scale, soft-cap, temperature and vocabulary limit of the logits.
        chunk_bytes: upper bound on the fp32 logits that exist at a time.
        backend: who computes.

    Returns:
        Ids, int64, best first and lowest first on ties, and values, fp32 (fp64 for fp64 input);
        shapes (N, K). Ids of the teacher that are masked have the value -inf: absent entries.

    Raises:
        ValueError: an argument of the wrong shape or range.
        TypeError: an argument of the wrong type.

    Numerics: fp32; store the values in fp32, too: those rounded to 16 bits have lost the tail.
    Memory: `chunk_bytes` of logits and the result.

    Example:
        >>> import torch
        >>> teacher = topk_log_probs(torch.tensor([[1.0, 3.0, 2.0]]), torch.eye(3), k=2)
        >>> teacher.ids
        tensor([[1, 2]])
        >>> teacher.values
        tensor([[-0.4076, -1.4076]])
    """
    check_number("k", k, 1, whole=True)
    side = Side("teacher", teacher_hidden, teacher_weight, teacher_bias, transform)
    check_weight("teacher", teacher_weight)
    check_side(side, teacher_hidden)
    _, hidden, weight, bias, transform, _ = as_autocast(side)
    backend_name, chunk_bytes = settings(hidden, backend, chunk_bytes)
    settings_ = transform.pack(), backend_name, chunk_bytes
    return TopK(*_ops.top_log_probs(hidden.detach(), weight, bias, min(k, side.vocab), *settings_))


def _name(tail: Tail) -> str:
    check_choice("tail", tail, get_args(Tail))
    return f"topk_kl_{tail}"


def _params(forward: float, reverse: float) -> list[float]:
    check_number("forward", forward, 0)
    check_number("reverse", reverse, 0)
    if not forward and not reverse:
        raise ValueError("forward: got weights that are all 0, expected at least one above 0")
    return [float(forward), float(reverse)]


def linear_topk_kl(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher: TopK,
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 1.0,
    reverse: float = 0.0,
    tail: Tail = "bucket",
    **options: Unpack[LinearRowOptions],
) -> Output:
    """Weigh forward and reverse KL to a teacher of which the K best ids of each token are stored.

    forward * KL(teacher || student) + reverse * KL(student || teacher), per token. Gradients go to
    the student's hidden states, weight and bias. With a teacher at hand:
    `linear_topk_kl(x, w, topk_log_probs(y, v, k=64))`.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher: ids, different within a row and below the student's vocabulary, and their
            log-probabilities, of the temperature that `student_transform` has; -inf marks an absent
            entry, whose id may be anything. In any order.
        target: token ids; only marks ignored rows.
        forward: weight of KL(teacher || student).
        reverse: weight of KL(student || teacher).
        tail: "bucket" counts all other ids as one more outcome, so that probability outside the
            ids costs; "renormalize" compares the shares within the ids alone, takes values that are
            off by a constant, final logits for example, and computes no other logits.
        **options: see `LinearRowOptions`.

    Returns:
        Nats per token (mean), summed, or of each row; fp32 (fp64 for fp64 input). With
        `return_stats` a pair (loss, `Stats`), whose divergences are those over the outcomes.

    Raises:
        ValueError: an argument of the wrong shape or range.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation, accurate also where both models nearly agree; one downcast, of
        the gradients. A teacher's tail below 1e-6 counts as 1e-6.
    Memory: "bucket": `chunk_bytes` of logits; "renormalize": tables of K numbers a row. dX and, for
        a trained head, dW.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#top-k-kl.

    Example:
        >>> import torch
        >>> teacher = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> linear_topk_kl(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.eye(4), teacher)
        tensor(0.0307)
    """
    sides = (student_hidden, student_weight), _checked(teacher)
    return fused_loss(_name(tail), _params(forward, reverse), *sides, target, **options)


def topk_kl(
    student_logits: Float[Tensor, "N V"],
    teacher: TopK,
    target: Integer[Tensor, "N"] | None = None,
    *,
    forward: float = 1.0,
    reverse: float = 0.0,
    tail: Tail = "bucket",
    **options: Unpack[RowOptions],
) -> Output:
    """Compute `linear_topk_kl` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        teacher: ids and log-probabilities, as in `linear_topk_kl`.
        target: token ids; only marks ignored rows.
        forward: weight of KL(teacher || student).
        reverse: weight of KL(student || teacher).
        tail: "bucket" or "renormalize".
        **options: see `RowOptions`.

    Returns:
        As `linear_topk_kl`.

    Example:
        >>> import torch
        >>> teacher = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> topk_kl(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), teacher)
        tensor(0.0307)
    """
    sides = (student_logits,), _checked(teacher)
    return fused_loss(_name(tail), _params(forward, reverse), *sides, target, **options)


class LinearTopKKL(LossModule):
    """`linear_topk_kl` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_topk_kl)

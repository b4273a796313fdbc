"""Dual top-K push-pull on final logits, per row, fused with the LM heads.

loss_n = pull + push_weight * push. C_K = top k_pull ids of the teacher, S_K = top k_push ids of the
student, u_i = s_i - t_i, h(u) = Huber loss of threshold delta:
pull = sum over C_K of h(u_i), and push by the chosen reading:

reading    push                                                 push gradient at a pushed id j
hinge      sum over S_K minus C_K of h(max(u_j - margin, 0))    clip(u_j - margin, 0, delta)
match      sum over S_K of h(u_j)                               clip(u_j, -delta, delta)
suppress   sum over S_K minus C_K of s_j                        1
bounded    sum over S_K minus C_K of -log(1 - p_j)              p_j - p_j * (others' odds)

`push_weight=0` is DUET's loss. Which of these the source paper uses is not known to us; "hinge" is
our default. The ids are constants. Exactly K of them are taken, lowest id first on ties. An id
masked in both models (-inf) is absent, one masked in the student is not pushed; one masked in the
teacher alone has infinite loss and the gradient of a large u. All readings but "bounded" have a
gradient on the chosen ids only, so that no dense gradient is formed; "bounded" works on
probabilities and reaches the whole vocabulary.
Elements of a block: two top-k passes and two counts. Derivation: kernels/README.md#push-pull.
Shapes: N tokens, C rows of a block, V vocabulary, K ids, D and E widths of student and teacher.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._checks import check_choice, check_number
from bidistill_kernels._loss import (
    LinearPairOptions,
    LossModule,
    Output,
    PairOptions,
    fused_loss,
)
from bidistill_kernels._rows import RowFunction, RowResult, SparseGradient, row_function

Reading: TypeAlias = Literal["hinge", "match", "suppress", "bounded"]


def top_ids(logits: Float[Tensor, "N V"], k: int) -> Integer[Tensor, "N K"]:
    """Return the ids of the K = min(k, V) largest logits of each row, lowest id first on ties.

    Example:
        >>> import torch
        >>> top_ids(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2)
        tensor([[0, 2]])
    """
    k = min(k, logits.shape[-1])
    values, ids = logits.topk(k)
    # topk may keep any of the ids that tie for the last place: such rows, rare in fp32, are sorted
    tied = ((logits >= values[:, -1:]).sum(-1) > k).nonzero().squeeze(1)
    ids[tied] = logits[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids


def push_pull_reference(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k_pull: int = 10,
    k_push: int = 10,
    push_weight: float = 1.0,
    margin: float = 0.0,
    delta: float = 1.0,
    reading: Reading = "hinge",
) -> Float[Tensor, "N"]:
    """Compute the loss of each row in plain PyTorch, in the dtype given: the specification."""

    def mask(logits: Tensor, k: int) -> Bool[Tensor, "N V"]:
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, value=True)

    def huber(u: Tensor) -> Tensor:
        return F.huber_loss(u, torch.zeros_like(u), reduction="none", delta=delta)

    def total(terms: Tensor, where: Tensor) -> Tensor:
        return terms.masked_fill(~where, 0).sum(-1)

    absent = student_logits.isneginf() & teacher_logits.isneginf()
    u = student_logits.masked_fill(absent, 0) - teacher_logits.masked_fill(absent, 0)
    pulled = mask(teacher_logits, k_pull)
    liked = mask(student_logits, k_push) & ~student_logits.isneginf()
    pushed = liked & ~pulled
    pull = total(huber(u), pulled)
    if reading == "hinge":
        push = total(huber((u - margin).relu()), pushed)
    elif reading == "match":
        push = total(huber(u), liked)
    elif reading == "suppress":
        push = total(student_logits, pushed)
    else:
        p = student_logits.softmax(-1).masked_fill(~pushed, 0)
        push = -torch.log1p(-p).sum(-1)
    return pull + push_weight * push


def _difference(student_logits_CV: Tensor, teacher_logits_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Student minus teacher at the given ids; 0 where both rule the id out (-inf - -inf = NaN)."""
    s_CK, t_CK = student_logits_CV.gather(1, ids_CK), teacher_logits_CV.gather(1, ids_CK)
    return (s_CK - t_CK).masked_fill_(s_CK.isneginf() & t_CK.isneginf(), 0)


def _huber(u_CK: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Summed Huber loss of each row and its derivative."""
    loss_CK = F.huber_loss(u_CK, torch.zeros_like(u_CK), reduction="none", delta=delta)
    return loss_CK.sum(-1), u_CK.clamp(-delta, delta)


class Choice(NamedTuple):
    """Ids that a block pulls and pushes."""

    pull_ids_CK: Tensor  # teacher's top ids
    push_ids_CK: Tensor  # student's top ids
    liked_CK: Tensor  # of the latter, those the student gives any probability
    own_CK: Tensor  # of these, those that are not pulled


def _choose(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, k_pull: int, k_push: int
) -> Choice:
    pull_ids_CK = top_ids(teacher_logits_CV, k_pull)
    push_ids_CK = top_ids(student_logits_CV, k_push)
    liked_CK = ~student_logits_CV.gather(1, push_ids_CK).isneginf()
    shared_CK = (push_ids_CK[:, :, None] == pull_ids_CK[:, None, :]).any(-1)
    return Choice(pull_ids_CK, push_ids_CK, liked_CK, liked_CK & ~shared_CK)


class Push(NamedTuple):
    """Push term of a block: loss, derivative at the pushed ids, and elsewhere if it has any."""

    loss_C: Tensor
    values_CK: Tensor
    dense_CV: Tensor | None = None


def _push_raw(
    reading: Reading,
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor,
    choice: Choice,
    margin: float,
    delta: float,
) -> Push:
    """Readings on raw logits: the gradient sits on the pushed ids alone."""
    if reading == "suppress":
        s_CK = student_logits_CV.gather(1, choice.push_ids_CK)
        pushed_CK = choice.own_CK
        return Push(s_CK.masked_fill(~pushed_CK, 0).sum(-1), pushed_CK.to(s_CK.dtype))
    u_CK = _difference(student_logits_CV, teacher_logits_CV, choice.push_ids_CK)
    if reading == "match":
        return Push(*_huber(u_CK.masked_fill(~choice.liked_CK, 0), delta))
    return Push(*_huber((u_CK - margin).relu().masked_fill(~choice.own_CK, 0), delta))


def _push_bounded(student_logits_CV: Tensor, choice: Choice) -> Push:
    """-log(1 - p_j) of the pushed ids; overwrites the student's logits with the dense part.

    With odds q_j = p_j / (1 - p_j): d/ds_i = q_i [i pushed] - p_i sum_j q_j. Only the top id can
    have p > 1/2; its 1 - p is summed from the others and its own odds are never formed, so that
    nothing overflows where the student is certain.
    """
    pushed_CK, ids_CK = choice.own_CK, choice.push_ids_CK
    s_CK = student_logits_CV.gather(1, ids_CK)
    top_C1, top_id_C1 = student_logits_CV.max(-1, keepdim=True)
    rest_CV = student_logits_CV.scatter_(1, top_id_C1, -torch.inf)
    log_rest_C1 = rest_CV.logsumexp(-1, keepdim=True)
    lse_C1 = torch.logaddexp(top_C1, log_rest_C1)
    is_top_CK = ids_CK == top_id_C1
    p_CK, p_top_C1 = (s_CK - lse_C1).exp(), (top_C1 - lse_C1).exp()
    log_not_p_CK = torch.log1p(-p_CK.masked_fill(is_top_CK, 0))
    log_not_p_CK = torch.where(is_top_CK, log_rest_C1 - lse_C1, log_not_p_CK)
    loss_C = -log_not_p_CK.masked_fill(~pushed_CK, 0).sum(-1)

    q_CK = (p_CK / (1 - p_CK.masked_fill(is_top_CK, 0))).masked_fill(~pushed_CK, 0)
    q_sum_C1 = q_CK.masked_fill(is_top_CK, 0).sum(-1, keepdim=True)
    top_pushed_C1 = (pushed_CK & is_top_CK).any(-1, keepdim=True)
    # p_i / (1 - p_top) is a softmax over the rest: p_i * q_top = that * p_top
    factor_C1 = top_pushed_C1 * p_top_C1 + (log_rest_C1 - lse_C1).exp() * q_sum_C1
    # the others may all be ruled out: -inf - -inf would be NaN
    log_rest_C1.clamp_(min=torch.finfo(s_CK.dtype).min)
    dense_CV = rest_CV.sub_(log_rest_C1).exp_().mul_(-factor_C1)
    dense_CV.scatter_(1, top_id_C1, -p_top_C1 * q_sum_C1)
    return Push(loss_C, q_CK, dense_CV)


def _row_function(reading: Reading) -> RowFunction:
    def rows(
        student_logits_CV: Tensor,
        teacher_logits_CV: Tensor | None,
        target_C: Tensor | None,
        params: Sequence[float],
        *,
        need_gradient: bool,
    ) -> RowResult:
        assert teacher_logits_CV is not None
        k_pull, k_push, push_weight, margin, delta = params
        logits = student_logits_CV, teacher_logits_CV
        choice = _choose(*logits, int(k_pull), int(k_push))
        loss_C, values_CK = _huber(_difference(*logits, choice.pull_ids_CK), delta)
        ids_CK, dense_CV = choice.pull_ids_CK, None
        if push_weight:
            bounded = reading == "bounded"
            push = (
                _push_bounded(student_logits_CV, choice)
                if bounded
                else _push_raw(reading, *logits, choice, margin, delta)
            )
            loss_C = loss_C + push_weight * push.loss_C
            ids_CK = torch.cat([ids_CK, choice.push_ids_CK], dim=1)
            values_CK = torch.cat([values_CK, push_weight * push.values_CK], dim=1)
            dense_CV = push.dense_CV
        if not need_gradient:
            return RowResult(loss_C, None)
        if dense_CV is None:
            return RowResult(loss_C, SparseGradient(ids_CK, values_CK))
        gradient_CV = dense_CV.mul_(push_weight).scatter_add_(1, ids_CK, values_CK)
        return RowResult(loss_C, gradient_CV)

    return rows


for _reading in get_args(Reading):
    row_function(f"push_pull_{_reading}")(_row_function(_reading))


def _name(reading: Reading) -> str:
    check_choice("reading", reading, get_args(Reading))
    return f"push_pull_{reading}"


def _params(
    k_pull: int, k_push: int, push_weight: float, margin: float, delta: float
) -> list[float]:
    check_number("k_pull", k_pull, 1, whole=True)
    check_number("k_push", k_push, 1, whole=True)
    check_number("push_weight", push_weight, 0)
    check_number("margin", margin, 0)
    check_number("delta", delta, 0, open_ends=True)
    return [float(x) for x in (k_pull, k_push, push_weight, margin, delta)]


def linear_push_pull(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "V E"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k_pull: int = 10,
    k_push: int = 10,
    push_weight: float = 1.0,
    margin: float = 0.0,
    delta: float = 1.0,
    reading: Reading = "hinge",
    **options: Unpack[LinearPairOptions],
) -> Output:
    """Pull the student's logits to the teacher's on its top ids, push down the student's own.

    sum over the teacher's top k_pull ids of huber(s_i - t_i) + push_weight * push, where push acts
    on those of the student's top k_push ids that the teacher does not rank; s, t = final logits.

    Args:
        student_hidden: last hidden states, any float type.
        student_weight: weight of the student's LM head.
        teacher_hidden: the teacher's hidden states of the same tokens.
        teacher_weight: weight of the teacher's head; may be the student's.
        target: token ids; only marks ignored rows.
        k_pull: number of the teacher's ids to imitate; more than the vocabulary means all.
        k_push: number of the student's ids looked at for the push.
        push_weight: weight of the push term; 0 is DUET's loss.
        margin: excess over the teacher that "hinge" leaves alone, in logits.
        delta: where the Huber loss turns from quadratic to linear, in logits.
        reading: "hinge" pushes what exceeds the teacher, never below it; "match" also pulls
            pushed ids up; "suppress" pushes by a constant, unbounded below: for forget rows with
            a small weight; "bounded" pushes by -log(1 - p), with a gradient on the whole
            vocabulary.
        **options: see `LinearPairOptions`.

    Returns:
        Loss per token (mean), summed, or of each row, in squared logits up to delta and logits
        beyond; fp32 (fp64 for fp64 input). With `return_stats` a pair (loss, `Stats`).

    Raises:
        ValueError: an argument of the wrong shape or range, or a trainable teacher.
        TypeError: an argument of the wrong type.

    Numerics: fp32 accumulation; one downcast, of the gradients. Sensitive to a constant added to
        one model's logits, which no distribution shows.
    Memory: `chunk_bytes` of logits; dX and, for a trained head, dW in fp32.
    Temperature: not multiplied by its square.
    Source: kernels/README.md#push-pull.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> linear_push_pull(student, torch.eye(2), teacher, torch.eye(2), k_pull=1, k_push=1)
        tensor(3.)
    """
    params = _params(k_pull, k_push, push_weight, margin, delta)
    sides = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
    return fused_loss(_name(reading), params, *sides, target, **options)


def push_pull(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    target: Integer[Tensor, "N"] | None = None,
    *,
    k_pull: int = 10,
    k_push: int = 10,
    push_weight: float = 1.0,
    margin: float = 0.0,
    delta: float = 1.0,
    reading: Reading = "hinge",
    **options: Unpack[PairOptions],
) -> Output:
    """Compute `linear_push_pull` of logits that exist already.

    Args:
        student_logits: raw logits, any float type; not modified.
        teacher_logits: raw logits of the teacher.
        target: token ids; only marks ignored rows.
        k_pull: number of the teacher's ids to imitate.
        k_push: number of the student's ids looked at for the push.
        push_weight: weight of the push term; 0 is DUET's loss.
        margin: excess over the teacher that "hinge" leaves alone.
        delta: where the Huber loss turns from quadratic to linear.
        reading: as in `linear_push_pull`.
        **options: see `PairOptions`.

    Returns:
        As `linear_push_pull`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> push_pull(student, teacher, k_pull=1, k_push=1)
        tensor(3.)
    """
    params = _params(k_pull, k_push, push_weight, margin, delta)
    sides = (student_logits, None), (teacher_logits, None)
    return fused_loss(_name(reading), params, *sides, target, **options)


class LinearPushPull(LossModule):
    """`linear_push_pull` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_push_pull)

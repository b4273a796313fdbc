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
The teacher may be stored: `TopK` of its best ids and final logits, where -inf marks an absent
entry: its id is not pulled and may be pushed. "hinge" and "match" then cannot push.
Elements of a block: two top-k passes; "bounded" one log-sum-exp and one exp of the vocabulary
more. Derivation: kernels/README.md#push-pull.
Shapes: N tokens, C rows of a chunk, V vocabulary, K ids, D and E widths of student and teacher.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from typing_extensions import Unpack

from bidistill_kernels._bounded import Bounded, push_bounded
from bidistill_kernels._checks import check_choice, check_number
from bidistill_kernels._loss import (
    LinearPairOptions,
    LossModule,
    Output,
    PairOptions,
    fused_loss,
)
from bidistill_kernels._rows import (
    Chunk,
    Logits,
    RowFunction,
    RowResult,
    SparseGradient,
    TopK,
    row_function,
)
from bidistill_kernels._stored import Stored

Reading: TypeAlias = Literal["hinge", "match", "suppress", "bounded"]


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


def _difference(s_CK: Tensor, t_CK: Tensor) -> Tensor:
    """Student minus teacher; 0 where both rule the id out (-inf - -inf = NaN)."""
    return (s_CK - t_CK).masked_fill_(s_CK.isneginf() & t_CK.isneginf(), 0)


def _huber(u_CK: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Summed Huber loss of each row and its derivative."""
    loss_CK = F.huber_loss(u_CK, torch.zeros_like(u_CK), reduction="none", delta=delta)
    return loss_CK.sum(-1), u_CK.clamp(-delta, delta)


class Part(NamedTuple):
    """Loss of each row at some ids, and its derivative there."""

    ids_CK: Tensor
    s_CK: Tensor  # student's final logits
    loss_C: Tensor
    values_CK: Tensor


def _stored(teacher: Logits | TopK, k: int) -> Stored:
    """The teacher's k best ids and final logits."""
    if isinstance(teacher, TopK):
        return Stored.read(TopK(teacher.ids[:, :k], teacher.values[:, :k]))
    ids_CK = teacher.top(k)
    return Stored.whole(ids_CK, teacher.at(ids_CK))


def _pull(student: Logits, stored: Stored, delta: float) -> Part:
    s_CK = student.at(stored.ids_CK)
    u_CK = _difference(s_CK, stored.values_CK.to(s_CK.dtype)).masked_fill_(stored.absent_CK, 0)
    return Part(stored.ids_CK, s_CK, *_huber(u_CK, delta))


class Liked(NamedTuple):
    """The student's best ids."""

    ids_CK: Tensor
    s_CK: Tensor
    any_CK: Tensor  # those the student gives any probability
    own_CK: Tensor  # of these, those that are not pulled


def _liked(student: Logits, stored: Stored, k: int) -> Liked:
    ids_CK = student.top(k)
    s_CK = student.at(ids_CK)
    any_CK = ~s_CK.isneginf()
    # no id is -1
    pulled_CK = stored.ids_CK.masked_fill(stored.absent_CK, -1)
    shared_CK = (ids_CK[:, :, None] == pulled_CK[:, None, :]).any(-1)
    return Liked(ids_CK, s_CK, any_CK, any_CK & ~shared_CK)


def _push_raw(reading: Reading, liked: Liked, chunk: Chunk, margin: float, delta: float) -> Part:
    """Readings on raw logits: the gradient sits on the pushed ids alone."""
    ids_CK, s_CK, any_CK, own_CK = liked
    if reading == "suppress":
        loss_C = s_CK.masked_fill(~own_CK, 0).sum(-1)
        return Part(ids_CK, s_CK, loss_C, own_CK.to(s_CK.dtype))
    assert chunk.teacher is not None
    assert not isinstance(chunk.teacher, TopK)
    u_CK = _difference(s_CK, chunk.teacher.at(ids_CK))
    if reading == "match":
        return Part(ids_CK, s_CK, *_huber(u_CK.masked_fill(~any_CK, 0), delta))
    return Part(ids_CK, s_CK, *_huber((u_CK - margin).relu().masked_fill(~own_CK, 0), delta))


def _write_bounded(
    chunk: Chunk, pull: Part, source_CK: Tensor, liked: Liked, push: Bounded, weight: float
) -> None:
    """Write the gradient of pull + weight * push: everywhere, then at the chosen ids.

    These are written and not added to, formed in full precision: a 16-bit sum would round twice.
    """
    student, gradient_CV = chunk.student, chunk.gradient_CV
    assert gradient_CV is not None
    push.write_others(student, weight, gradient_CV)
    pulled_CK = pull.values_CK + weight * push.others(pull.ids_CK, pull.s_CK)
    pulled_CK = student.chain(pulled_CK, pull.s_CK).gather(1, source_CK)
    gradient_CV.scatter_(1, pull.ids_CK, pulled_CK.to(gradient_CV.dtype))
    pushed_CK = weight * (push.q_CK + push.others(liked.ids_CK, liked.s_CK))
    pushed_CK = student.chain(pushed_CK, liked.s_CK).to(gradient_CV.dtype)
    # the student's other ids keep what they have
    kept_CK = gradient_CV.gather(1, liked.ids_CK)
    gradient_CV.scatter_(1, liked.ids_CK, torch.where(liked.own_CK, pushed_CK, kept_CK))


def _row_function(reading: Reading | None) -> RowFunction:
    """Row function of a reading; None: the pull alone."""

    def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
        student, teacher = chunk.student, chunk.teacher
        assert teacher is not None
        k_pull, k_push, push_weight, margin, delta = params
        stored = _stored(teacher, int(k_pull))
        pull = _pull(student, stored, delta)
        parts, loss_C = [pull], pull.loss_C
        if reading is not None:
            liked = _liked(student, stored, int(k_push))
            if reading == "bounded":
                push = push_bounded(student, liked.ids_CK, liked.s_CK, liked.own_CK)
                if chunk.need_gradient:
                    _write_bounded(chunk, pull, stored.source_CK, liked, push, push_weight)
                return RowResult(loss_C + push_weight * push.loss_C)
            push = _push_raw(reading, liked, chunk, margin, delta)
            loss_C = loss_C + push_weight * push.loss_C
            parts.append(push._replace(values_CK=push_weight * push.values_CK))
        if not chunk.need_gradient:
            return RowResult(loss_C)
        values = [student.chain(part.values_CK, part.s_CK) for part in parts]
        ids_CK = torch.cat([part.ids_CK for part in parts], dim=1)
        return RowResult(loss_C, sparse=SparseGradient(ids_CK, torch.cat(values, dim=1)))

    return rows


def _pulled(params: Sequence[float], V: int, K: int) -> int:
    """Ids that a row pulls; a stored teacher has no more than its K."""
    return min(int(params[0]), K or V)


def _pulled_and_pushed(params: Sequence[float], V: int, K: int) -> int:
    return _pulled(params, V, K) + min(int(params[1]), V)


for _reading in get_args(Reading):
    _width = None if _reading == "bounded" else _pulled_and_pushed
    row_function(f"push_pull_{_reading}", width=_width)(_row_function(_reading))
row_function("pull", width=_pulled)(_row_function(None))
# to a stored teacher: no logits but those at its ids are computed
row_function("pull_stored", width=_pulled, gathers=True)(_row_function(None))


class Call(NamedTuple):
    """What the public functions pass on: name and numbers of a row function."""

    name: str
    params: list[float]


def _call(
    teacher: Tensor | TopK,
    k_pull: int,
    k_push: int,
    push_weight: float,
    margin: float,
    delta: float,
    reading: Reading,
) -> Call:
    check_choice("reading", reading, get_args(Reading))
    check_number("k_pull", k_pull, 1, whole=True)
    check_number("k_push", k_push, 1, whole=True)
    check_number("push_weight", push_weight, 0)
    check_number("margin", margin, 0)
    check_number("delta", delta, 0, open_ends=True)
    params = [float(x) for x in (k_pull, k_push, push_weight, margin, delta)]
    stored = isinstance(teacher, TopK)
    if stored and isinstance(teacher.ids, Tensor) and k_pull > teacher.ids.shape[-1]:
        raise ValueError(
            f"k_pull: got {k_pull}, expected at most the {teacher.ids.shape[-1]} ids that the "
            "teacher's TopK stores; store more, or pull fewer"
        )
    if not push_weight:
        return Call("pull_stored" if stored else "pull", params)
    if stored and reading in ("hinge", "match"):
        raise ValueError(
            f"reading: got {reading!r}, which compares the student's own ids with the teacher's "
            "logits there, and a TopK does not hold these; expected 'suppress' or 'bounded'; "
            "or pass push_weight=0, or the teacher's hidden states and head"
        )
    return Call(f"push_pull_{reading}", params)


def linear_push_pull(
    student_hidden: Float[Tensor, "N D"],
    student_weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"] | TopK,
    teacher_weight: Float[Tensor, "V E"] | None,
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
        teacher_hidden: the teacher's hidden states of the same tokens; or `TopK` of its best ids,
            different within a row and best first, and its final logits there (-inf: an absent
            entry), for push_weight=0 and the readings "suppress" and "bounded".
        teacher_weight: weight of the teacher's head; may be the student's; None for a `TopK`.
        target: token ids; only marks ignored rows.
        k_pull: number of the teacher's ids to imitate; more than the vocabulary means all; of a
            `TopK` at most as many as it stores.
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
    if isinstance(teacher_hidden, TopK) != (teacher_weight is None):
        kind = "a TopK" if isinstance(teacher_hidden, TopK) else "hidden states"
        raise TypeError(
            f"teacher_weight: got {'None' if teacher_weight is None else 'one'} with {kind}, "
            "expected None with a TopK and the head's weight with hidden states"
        )
    name, params = _call(teacher_hidden, k_pull, k_push, push_weight, margin, delta, reading)
    stored = isinstance(teacher_hidden, TopK)
    teacher = teacher_hidden if stored else (teacher_hidden, teacher_weight)
    sides = (student_hidden, student_weight), teacher
    return fused_loss(name, params, *sides, target, **options)


def push_pull(
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"] | TopK,
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
        teacher_logits: raw logits of the teacher, or `TopK` of its best ids and final logits.
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
    name, params = _call(teacher_logits, k_pull, k_push, push_weight, margin, delta, reading)
    stored = isinstance(teacher_logits, TopK)
    sides = (student_logits,), teacher_logits if stored else (teacher_logits,)
    return fused_loss(name, params, *sides, target, **options)


class LinearPushPull(LossModule):
    """`linear_push_pull` as a module: options to the constructor, tensors to the call."""

    function = staticmethod(linear_push_pull)

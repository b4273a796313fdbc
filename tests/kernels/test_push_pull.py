"""Push-pull: the definition, the invariants of each reading, ties and edges.

The fused form is tested in test_lm_head.py. The invariants name the readings: hinge and match work
on differences to the teacher, suppress and bounded on the student alone.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import (
    LogitTransform,
    linear_push_pull,
    push_pull,
    push_pull_reference,
)
from bidistill_kernels._rows import ROW_LOSSES, Chunk, TopK
from bidistill_kernels._top import top_ids
from bidistill_kernels._torch_rows import TorchLogits
from tests.kernels.cases import make_inputs
from tests.support import assert_close

inf = torch.inf
READINGS = ["hinge", "match", "suppress", "bounded"]
each_reading = pytest.mark.parametrize("reading", READINGS)
V = 30


def rows(student, teacher, **options):
    return push_pull(student, teacher, reduction="none", **options)


def draw(seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, V, generator=g, dtype=torch.float64) * spread for _ in range(2)]


def gradient(student, teacher, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(rows(student, teacher, **options).sum(), student)[0]


def chosen(logits, k):
    """Mask of the k largest, by a full sort."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, value=True)


def test_reference_matches_definition():
    """By hand: the teacher ranks ids 1 and 2, the student 0 and 1, so 0 alone is pushed."""
    s, t = torch.tensor([[4.0, 3.0, 0.0, 1.0]]), torch.tensor([[1.0, 3.5, 2.0, 0.0]])
    pull = 0.5**2 / 2 + (2.0 - 0.5)  # u = -0.5 quadratic, u = -2 linear
    p = s.softmax(-1)[0, 0].item()
    push: dict[Any, float] = {
        "hinge": (3.0 - 0.25) - 0.5,
        "match": (3.0 - 0.5) + 0.5**2 / 2,  # id 1 is counted in both directions
        "suppress": 4.0,
        "bounded": -torch.log1p(torch.tensor(-p)).item(),
    }
    for reading, term in push.items():
        options = {"k_pull": 2, "k_push": 2, "push_weight": 2.0, "margin": 0.25}
        loss = push_pull_reference(s, t, reading=reading, **options)
        torch.testing.assert_close(loss, torch.tensor([pull + 2 * term]), msg=reading)
        torch.testing.assert_close(rows(s, t, reading=reading, **options), loss, msg=reading)


@each_reading
def test_gradcheck(reading):
    s, t = draw(1)
    s.requires_grad_()
    options = {"reading": reading, "k_pull": 4, "k_push": 6, "margin": 0.2, "push_weight": 0.7}
    assert torch.autograd.gradcheck(lambda s: push_pull_reference(s, t, **options), s)
    assert torch.autograd.gradcheck(lambda s: rows(s, t, **options), s)


# --- invariants ---------------------------------------------------------------------------


@each_reading
def test_never_negative(reading):
    s, t = draw(2)
    loss = rows(s - 100, t, reading=reading)
    # suppress rewards low logits without a bound
    assert (loss >= 0).all() or reading == "suppress"
    assert (rows(s - 1e4, t, reading="suppress", push_weight=9.0) < 0).any()


@each_reading
def test_zero_loss_and_gradient_where_student_equals_teacher(reading):
    s, _ = draw(3)
    assert not rows(s, s.clone(), reading=reading, k_push=8).any()
    assert not gradient(s, s.clone(), reading=reading, k_push=8).any()
    # suppress and bounded need the pushed ids to be pulled as well
    more = gradient(s, s.clone(), reading=reading, k_pull=4, k_push=9)
    assert more.any() == (reading in ("suppress", "bounded"))


@each_reading
def test_gradient_support(reading):
    s, t = draw(4)
    support = gradient(s, t, reading=reading, k_pull=5, k_push=7) != 0
    union = chosen(t, 5) | chosen(s, 7)
    if reading == "bounded":  # a probability concerns every id
        assert support.all()
    else:
        assert not (support & ~union).any()
        assert (support & chosen(s, 7) & ~chosen(t, 5)).any()


def push_gradient(s, t, **options):
    """The push term's share of the gradient, at one id pushed in each row, and these ids."""
    whole = gradient(s, t, push_weight=0.7, **options)
    push = whole - gradient(s, t, push_weight=0.0, **options)
    return push, (chosen(s, options["k_push"]) & ~chosen(t, options["k_pull"]))


def test_push_gradient_of_match():
    s, t = draw(5)
    push, _ = push_gradient(s, t, reading="match", k_pull=4, k_push=6, delta=1.5)
    expected = 0.7 * (s - t).clamp(-1.5, 1.5) * chosen(s, 6)
    torch.testing.assert_close(push, expected)


def test_push_gradient_of_hinge():
    s, t = draw(5)
    push, own = push_gradient(s, t, reading="hinge", k_pull=4, k_push=6, margin=0.5)
    torch.testing.assert_close(push, 0.7 * (s - t - 0.5).clamp(0, 1) * own)
    # strictly downward wherever the student exceeds the teacher by more than the margin
    assert (push[own & (s > t + 0.5)] > 0).all()
    assert (push >= -1e-12).all()


def test_push_gradient_of_suppress():
    s, t = draw(5)
    push, own = push_gradient(s, t, reading="suppress", k_pull=4, k_push=6)
    torch.testing.assert_close(push, 0.7 * own.double())


def test_push_gradient_of_bounded():
    s, t = draw(5)
    t = s.clone()
    t[:, :] = torch.where(chosen(s, 1), s - 50, s)  # the student's first id alone is pushed
    push, own = push_gradient(s, t, reading="bounded", k_pull=4, k_push=4)
    assert (own.sum(-1) == 1).all()
    p = s.softmax(-1)
    p_j = p[own][:, None]
    expected = torch.where(own, p_j, -p * p_j / (1 - p_j))
    torch.testing.assert_close(push, 0.7 * expected)


@each_reading
def test_whole_vocabulary_pulled(reading):
    s, t = draw(6)
    options = {"reading": reading, "k_pull": V, "k_push": 7}
    pull = rows(s, t, push_weight=0.0, **options)
    extra = rows(s, t, **options) - pull
    if reading == "match":  # counts the student's ids twice
        huber = torch.where((s - t).abs() <= 1, (s - t) ** 2 / 2, (s - t).abs() - 0.5)
        torch.testing.assert_close(extra, (huber * chosen(s, 7)).sum(-1))
    else:
        assert not extra.any()
    # more ids than there are means all of them
    torch.testing.assert_close(rows(s, t, reading=reading, k_pull=9 * V, k_push=7), pull + extra)


@each_reading
def test_no_push_is_duet_bit_for_bit(reading):
    s, t = draw(7)
    u = (s - t).masked_fill(~chosen(t, 10), 0)
    duet = torch.where(u.abs() <= 1, u**2 / 2, u.abs() - 0.5).sum(-1)
    options = {"push_weight": 0.0, "reading": reading}
    torch.testing.assert_close(rows(s, t, **options), duet)
    hinge = {**options, "reading": "hinge"}
    assert torch.equal(rows(s, t, **options), rows(s, t, **hinge))
    assert torch.equal(gradient(s, t, **options), gradient(s, t, **hinge))


@each_reading
def test_ignored_rows_never_change_the_loss(reading):
    s, t = draw(8)
    target = torch.tensor([0, -100, 0, -100, 0])
    loss = push_pull(s, t, target, reading=reading)
    s[1], t[3] = 77.0, -5.0
    assert torch.equal(push_pull(s, t, target, reading=reading), loss)


# --- properties ---------------------------------------------------------------------------

properties = settings(derandomize=True, max_examples=15, deadline=None)


@properties
@given(st.integers(0, 2**31), st.floats(-20, 20), st.sampled_from(["hinge", "match"]))
def test_a_constant_on_both_sides_changes_nothing(seed, constant, reading):
    s, t = draw(seed)
    options = {"reading": reading, "k_pull": 4, "k_push": 6}
    expected = rows(s, t, **options)
    torch.testing.assert_close(rows(s + constant, t + constant, **options), expected)
    # raw logits are not distributions: on one side alone it does change the loss
    assert not torch.allclose(rows(s + 3, t, **options), expected)


@properties
@given(st.integers(0, 2**31), st.sampled_from(READINGS))
def test_the_order_of_the_vocabulary_changes_nothing(seed, reading):
    s, t = draw(seed)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    options = {"reading": reading, "k_pull": 4, "k_push": 6}
    torch.testing.assert_close(rows(s[:, order], t[:, order], **options), rows(s, t, **options))


@properties
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_ties_go_to_the_lowest_ids(values, k):
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    ids = top_ids(logits, k)
    assert ids.shape == (2, min(k, len(values)))
    assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :k])


# --- edges --------------------------------------------------------------------------------


@each_reading
def test_masked_ids(reading):
    s, t = draw(9)
    s[0, :25] = t[0, :25] = -inf  # absent: five ids are left, fewer than k
    s[1, :25] = -inf  # ruled out by the student alone: nothing to push there
    t[1, :25] = -50
    options = {"reading": reading, "k_pull": 5, "k_push": 8}
    loss = rows(s, t, **options)
    expected = push_pull_reference(s, t, **options)
    torch.testing.assert_close(loss, expected)
    assert loss[0].isfinite()
    assert not gradient(s, t, **options)[0].isnan().any()


def test_bounded_where_the_student_has_no_other_id():
    s, t = torch.full((1, 4), -inf), torch.tensor([[0.0, 1.0, 2.0, -50.0]])
    s[0, 3] = 2.0
    assert rows(s, t, reading="bounded", k_pull=1, k_push=2) == inf  # -log(1 - 1)
    pull = gradient(s, t, reading="bounded", k_pull=1, k_push=2, push_weight=0.0)
    push = gradient(s, t, reading="bounded", k_pull=1, k_push=2) - pull
    torch.testing.assert_close(push, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))


@each_reading
def test_logits_of_ten_thousand(reading):
    s, t = draw(10)
    s, t = s.float(), t.float()
    s[0, 3], s[1, 4], t[2, 5] = 1e4, -1e4, 1e4
    options = {"reading": reading, "k_pull": 3, "k_push": 5}
    loss = rows(s, t, **options)
    grad = gradient(s, t, **options)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    if reading == "bounded":
        # the definition needs 1 - p of p = 1 - e^-9990, which float64 does not have either:
        # the log of the others' share of the sum gives it
        rest = s[0].double().index_fill(0, torch.tensor([3]), -inf).logsumexp(-1)
        push = loss[0] - rows(s, t, push_weight=0.0, **options)[0]
        torch.testing.assert_close(push.double(), 1e4 - rest, rtol=1e-2, atol=0)
        assert grad[0, 3] - gradient(s, t, push_weight=0.0, **options)[0, 3] == 1
    else:
        expected = push_pull_reference(s.double(), t.double(), **options)
        assert_close("loss", loss, expected, push_pull_reference(s, t, **options))


# --- stored teacher -----------------------------------------------------------------------


def store(logits, k):
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return TopK(ids[:, :k].contiguous(), values[:, :k].contiguous())


STORED: Any = [("hinge", 0.0), ("bounded", 0.0), ("suppress", 0.7), ("bounded", 0.7)]


@pytest.mark.parametrize(("reading", "push_weight"), STORED)
def test_stored_teacher_is_the_teacher(reading, push_weight):
    s, t = draw(11)
    options = {"reading": reading, "push_weight": push_weight, "k_pull": 6, "k_push": 8}
    for k in (6, 9):  # more than are pulled
        teacher = store(t, k)
        torch.testing.assert_close(rows(s, teacher, **options), rows(s, t, **options))
        torch.testing.assert_close(gradient(s, teacher, **options), gradient(s, t, **options))
    # and fused with the head
    x, w, y, v, target = make_inputs(7, 40).to(torch.float32)
    options["student_transform"] = LogitTransform(softcap=9.0)
    results = []
    for sides in ((y, v), (store(y @ v.T, 6), None)):
        loss = linear_push_pull(x, w, *sides, target, **options)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for stored, online in zip(*results, strict=True):
        torch.testing.assert_close(stored, online)


@pytest.mark.parametrize(("reading", "push_weight"), STORED)
def test_absent_entries_of_a_stored_teacher(reading, push_weight):
    """They pull nothing, and what their id says is neither pulled nor spared the push."""
    s, t = draw(12)
    options = {"reading": reading, "push_weight": push_weight, "k_push": 8}
    ids, values = store(t, 6)
    s[4, 0] = 20.0
    best = s.argmax(-1)
    full = TopK(ids.clone(), values.clone())
    values[0, 2:], ids[0, 2:] = -inf, 0  # padding repeats one id
    values[1, 3:], ids[1, 3:] = -inf, ids[1, 0].clone()  # the id of a real entry
    values[2, 1:], ids[2, 1:] = -inf, best[2]  # the id that the student likes best
    values[3, 4:], ids[3, 4:] = -inf, -1  # no id
    values[4], ids[4] = -inf, best[4]  # nothing is stored
    loss = rows(s, TopK(ids, values), k_pull=6, **options)
    got = gradient(s, TopK(ids, values), k_pull=6, **options)
    for n, k in enumerate((2, 3, 1, 4)):
        row, alone = slice(n, n + 1), TopK(full.ids[n : n + 1, :k], full.values[n : n + 1, :k])
        torch.testing.assert_close(loss[row], rows(s[row], alone, k_pull=k, **options))
        torch.testing.assert_close(got[row], gradient(s[row], alone, k_pull=k, **options))
    # nothing to pull: the push alone is left, on all the student's ids
    assert got[4].any() == loss[4].any() == (push_weight > 0)
    if push_weight:
        own = chosen(s[4:], 8)
        p = s[4:].softmax(-1).masked_fill(~own, 0)
        push = s[4:][own].sum() if reading == "suppress" else -torch.log1p(-p).sum()
        torch.testing.assert_close(loss[4], push_weight * push)


def test_duet_of_a_stored_teacher_projects_nothing(monkeypatch):
    from bidistill_kernels import _products

    def refuse(*args):
        raise AssertionError("projected")

    x, w, y, v, target = make_inputs(7, 40).to(torch.float32)
    teacher = store(y @ v.T, 10)
    monkeypatch.setattr(_products, "project", refuse)
    linear_push_pull(x, w, teacher, None, target, push_weight=0.0).backward()
    with pytest.raises(AssertionError, match="projected"):
        linear_push_pull(x, w, teacher, None, target, reading="suppress")


z, few = torch.randn(4, 9), TopK(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
REJECTED: Any = {
    "hinge": ({}, ValueError, "reading: got 'hinge'.*'suppress' or 'bounded'.*push_weight=0"),
    "match": ({"reading": "match"}, ValueError, "reading: got 'match'"),
    "too few": ({"k_pull": 4, "push_weight": 0.0}, ValueError, "k_pull: got 4.* 3 ids"),
}


@pytest.mark.parametrize(("options", "error", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects_with_a_stored_teacher(options, error, message):
    options = {"k_pull": 3, **options}
    with pytest.raises(error, match=message):
        push_pull(z, few, **options)
    with pytest.raises(error, match=message):
        linear_push_pull(z, z, few, None, **options)


def test_rejects_half_a_teacher():
    with pytest.raises(TypeError, match="teacher_weight: got one with a TopK"):
        linear_push_pull(z, z, few, z, k_pull=3, push_weight=0.0)
    with pytest.raises(TypeError, match="teacher_weight: got None with hidden states"):
        linear_push_pull(z, z, z, None)


# --- gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("k_pull", [3, V])
def test_a_16_bit_gradient_is_rounded_once(k_pull):
    """Also where an id is pulled, pushed and moved by the others' probabilities."""
    s, t = (logits.float() for logits in draw(13, spread=1.0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (TorchLogits(z.clone(), None, LogitTransform()) for z in (s, t))
        buffer = torch.full_like(s, torch.nan, dtype=dtype)
        chunk = Chunk(student, teacher, None, buffer, need_gradient=True)
        ROW_LOSSES["push_pull_bounded"].function(chunk, [k_pull, 7, 0.7, 0.0, 1.0])
        results.append(buffer)
    assert torch.equal(results[0].bfloat16(), results[1])


def test_no_dense_gradient_is_formed(monkeypatch):
    """Readings on raw logits multiply gathered head rows, never (C, V) by (V, D)."""
    from bidistill_kernels import lm_head

    def refuse(*args):
        raise AssertionError("dense gradient")

    monkeypatch.setattr(lm_head._Job, "_add_dense", refuse)
    x, w = torch.randn(4, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    y, v = torch.randn(4, 3), torch.randn(40, 3)
    readings: Any = ("hinge", "match", "suppress")
    for reading in readings:
        (dw,) = torch.autograd.grad(linear_push_pull(x, w, y, v, reading=reading), w)
        assert dw.any(-1).sum() < 40
    with pytest.raises(AssertionError, match="dense gradient"):
        linear_push_pull(x, w, y, v, reading="bounded")

"""Forward and reverse KL and cross-entropy of existing logits.

Definition, accuracy where both models nearly agree, properties, and edges where a distribution
rules an id out. The fused form is tested in test_lm_head.py.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import (
    bidirectional_kl,
    bidirectional_kl_reference,
    cross_entropy,
    cross_entropy_reference,
)
from tests.support import assert_close

inf = torch.inf
FORWARD: dict[str, Any] = {"forward": 1.0, "reverse": 0.0}
REVERSE: dict[str, Any] = {"forward": 0.0, "reverse": 1.0}
BOTH = pytest.mark.parametrize("weights", [FORWARD, REVERSE], ids=["forward", "reverse"])


def rows(student, teacher, **options):
    return bidirectional_kl(student, teacher, reduction="none", **options)


def test_reference_matches_definition():
    # p = (3/4, 1/4), q = (1/2, 1/2), by hand
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    for weights, expected in ((FORWARD, forward), (REVERSE, reverse)):
        loss = bidirectional_kl_reference(student, teacher, **weights)
        torch.testing.assert_close(loss, torch.tensor([expected]))
    label = torch.tensor([1])
    loss = bidirectional_kl_reference(student, teacher, label, cross_entropy=2.0)
    expected = 0.5 * (forward + reverse) + 2 * math.log(2)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_reference_matches_torch():
    s, t = torch.randn(5, 40, dtype=torch.float64) * 4, torch.randn(5, 40, dtype=torch.float64) * 4
    for first, second, weights in ((s, t, FORWARD), (t, s, REVERSE)):
        log_q, log_p = first.log_softmax(-1), second.log_softmax(-1)
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(bidirectional_kl_reference(s, t, **weights), expected)


@pytest.mark.parametrize("weights", [FORWARD, REVERSE, {"cross_entropy": 0.3}], ids=str)
def test_reference_gradcheck(weights):
    s = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    t, target = torch.randn(3, 7, dtype=torch.float64), torch.tensor([0, 6, 2])
    check = torch.autograd.gradcheck
    assert check(lambda s: bidirectional_kl_reference(s, t, target, **weights), s)
    # and of the operation, on logits
    assert check(lambda s: rows(s, t, target=target, **weights), s)


@BOTH
def test_accurate_where_the_models_nearly_agree(weights):
    """KL of 2e-6: a plain difference of log-sum-exps has no digit of it left in float32."""
    s = torch.randn(20, 4000) * 6
    t = s + torch.randn(20, 4000) * 2e-3
    s64, t64 = s.double().requires_grad_(), t.double()
    expected = bidirectional_kl_reference(s64, t64, **weights)
    s = s.requires_grad_()
    loss = rows(s, t, **weights)
    plain = bidirectional_kl_reference(s, t, **weights)

    def error(actual):
        return ((actual.double() - expected) / expected).abs().max().item()

    assert expected.max() < 1e-5
    assert error(loss) < 2e-3 < 2e-2 < error(plain)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    (gradient64,) = torch.autograd.grad(expected.sum(), s64)
    assert (gradient - gradient64).norm() / gradient64.norm() < 1e-3


def test_both_parts_are_in_the_stats_at_small_divergence():
    s = torch.randn(20, 4000) * 6
    t = s + torch.randn(20, 4000) * 2e-2
    _, stats = bidirectional_kl(s, t, return_stats=True)
    for name, weights in (("forward_kl", FORWARD), ("reverse_kl", REVERSE)):
        expected = bidirectional_kl_reference(s.double(), t.double(), **weights)
        torch.testing.assert_close(getattr(stats, name).double(), expected, rtol=2e-4, atol=0)


def draw(seed, rows=4, vocabulary=31):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, vocabulary, generator=g, dtype=torch.float64) * 5 for _ in range(2)]


properties = settings(derandomize=True, max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)


@properties
@given(seeds, st.floats(0, 3), st.floats(0.1, 3))
def test_never_negative_and_zero_for_equal_models(seed, forward, reverse):
    s, t = draw(seed)
    weights = {"forward": forward, "reverse": reverse}
    assert (rows(s.float(), t.float(), **weights) >= -1e-6).all()
    s = s.float().requires_grad_()
    loss = rows(s, s.detach().clone(), **weights)
    assert not loss.any()
    assert not torch.autograd.grad(loss.sum(), s)[0].any()


@properties
@given(seeds, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(seed, a, b):
    s, t = draw(seed)
    torch.testing.assert_close(rows(s + a, t + b), rows(s, t))


@properties
@given(seeds)
def test_the_order_of_the_vocabulary_changes_nothing(seed):
    s, t = draw(seed)
    order = torch.randperm(s.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rows(s[:, order], t[:, order]), rows(s, t))


@properties
@given(seeds)
def test_linear_in_its_weights_and_its_own_mirror(seed):
    s, t = draw(seed)
    mixed = rows(s, t, forward=0.3, reverse=1.1)
    torch.testing.assert_close(mixed, 0.3 * rows(s, t, **FORWARD) + 1.1 * rows(s, t, **REVERSE))
    torch.testing.assert_close(rows(s, t, **FORWARD), rows(t, s, **REVERSE))


@BOTH
def test_logits_of_ten_thousand(weights):
    """Peaked logits of +-1e4, the label's too, lose no more digits than in plain PyTorch."""
    s = torch.randn(6, 50)
    s[:, 3], s[:, 4] = 1e4, -1e4
    t = s + torch.randn(6, 50) * 0.1
    t[3:] = t[3:].roll(1, -1)
    target = torch.tensor([3, 4, 5, 3, 4, 5])
    for extra in ({}, {"cross_entropy": 1.0}):
        options = {**weights, **extra}
        loss = rows(s, t, target=target, **options)
        expected = bidirectional_kl_reference(s.double(), t.double(), target, **options)
        own = bidirectional_kl_reference(s, t, target, **options)
        assert_close("loss", loss, expected, own)


def test_teacher_rules_out_ids():
    s = torch.randn(3, 8, requires_grad=True)
    t = torch.randn(3, 8).index_fill(1, torch.tensor([2, 5]), -inf)
    loss = rows(s, t, **FORWARD)
    s64 = s.detach().double().requires_grad_()
    expected = bidirectional_kl_reference(s64, t.double(), **FORWARD)
    assert_close("loss", loss, expected, bidirectional_kl_reference(s, t, **FORWARD))
    pairs = zip(
        torch.autograd.grad(loss.sum(), s), torch.autograd.grad(expected.sum(), s64), strict=True
    )
    for actual, wanted in pairs:
        assert_close("gradient", actual, wanted, wanted.float())
    # the student gives these ids some probability: infinitely surprising to the teacher
    assert (rows(s, t, **REVERSE) == inf).all()
    assert (bidirectional_kl_reference(s, t, **REVERSE) == inf).all()


@pytest.mark.parametrize("weights", [FORWARD, REVERSE, {}], ids=str)
def test_ids_ruled_out_by_both_are_absent(weights):
    s, t = torch.randn(3, 8), torch.randn(3, 8)
    kept, masked = torch.tensor([0, 1, 3, 4, 6, 7]), torch.tensor([2, 5])
    few = s[:, kept].requires_grad_()
    all_ = s.index_fill(1, masked, -inf).requires_grad_()
    loss = rows(all_, t.index_fill(1, masked, -inf), **weights)
    expected = rows(few, t[:, kept], **weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        bidirectional_kl_reference(all_, t.index_fill(1, masked, -inf), **weights), expected
    )
    (gradient,) = torch.autograd.grad(loss.sum(), all_)
    (wanted,) = torch.autograd.grad(expected.sum(), few)
    torch.testing.assert_close(gradient[:, kept], wanted)
    assert not gradient[:, masked].any()


@BOTH
def test_an_input_nan_is_not_hidden(weights):
    s, t = torch.randn(2, 8), torch.randn(2, 8)
    s[0, 3] = torch.nan
    loss = rows(s.requires_grad_(), t, **weights)
    assert loss.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    assert gradient.isfinite().all(-1).tolist() == [False, True]


def test_inputs_are_not_modified():
    s, t = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    before = s.detach().clone(), t.clone()
    bidirectional_kl(s, t).backward()
    assert torch.equal(s, before[0])
    assert torch.equal(t, before[1])


def test_cross_entropy_matches_torch():
    s = (torch.randn(5, 40) * 4).requires_grad_()
    target = torch.tensor([0, 39, -100, 5, 7])
    loss = cross_entropy(s, target)
    expected = F.cross_entropy(s, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], torch.autograd.grad(expected, s)[0])
    s64 = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 6, 2])
    assert torch.autograd.gradcheck(lambda s: cross_entropy_reference(s, label), s64)


def test_cross_entropy_at_the_edges():
    s = torch.tensor([[1e4, 1e4 - 1, -1e4], [0.0, -inf, 1.0], [0.0, -inf, 1.0]])
    loss = cross_entropy(s, torch.tensor([1, 0, 1]), reduction="none")
    expected = cross_entropy_reference(s.double(), torch.tensor([1, 0, 1]))
    assert_close(
        "loss", loss, expected, F.cross_entropy(s, torch.tensor([1, 0, 1]), reduction="none")
    )
    assert loss[2] == inf


def test_cross_entropy_keeps_the_digits_of_a_confident_row():
    """p - 1 of a target with p = 1 - 1e-6 is formed in float32, not rounded to 16 bits first."""
    s = torch.tensor([[14.0, 0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(s, torch.tensor([0])), s)
    expected = -2 / (math.exp(14) + 2)
    assert gradient[0, 0].item() == pytest.approx(expected, rel=0.1)

"""MUSE's metrics at their ends, against hand-counted pairs, and with published AUCs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.errors import UserError
from bidistill.evaluation.metrics.muse import (
    first_answer,
    knowmem,
    membership_auc,
    privleak,
    verbmem,
)

cases = settings(deadline=None, derandomize=True, max_examples=60)
scores = st.lists(st.integers(-5, 0), min_size=1, max_size=8)


def test_verbmem_is_f1_in_percent():
    # common: a b; precision 2/2, recall 2/4, F1 = 2/3
    assert verbmem("a b", "a b c d") == pytest.approx(200 / 3)
    assert verbmem("a b c d", "a b c d") == 100
    assert verbmem("x", "a b c d") == 0


def test_no_metric_stems():
    assert verbmem("killed", "kill") == 0
    assert knowmem("killed", "kill") == 0


@pytest.mark.parametrize(
    "rest", ["\n\nMore text", "\nQuestion: What is it?", " Question: What?", "\nQuestion Question:"]
)
def test_knowmem_counts_the_first_answer_alone(rest):
    assert first_answer("Onhava" + rest).strip() == "Onhava"
    # uncut, the further words would lower the precision
    assert knowmem("Onhava" + rest, "Onhava") == 100


def test_knowmem_of_a_reply_that_only_asks_is_zero():
    assert knowmem("\n\nOnhava", "Onhava") == 0
    assert knowmem("Onhava in Zembla", "Onhava") == pytest.approx(50)  # P 1/3, R 1


@pytest.mark.parametrize("metric", [verbmem, knowmem])
def test_empty_truth_is_refused(metric):
    with pytest.raises(UserError, match=r"reference: got ''"):
        metric("text", "")


def test_auc_by_hand():
    # pairs (holdout, forget): -1 > -3, -1 > -2, -2 > -3, -2 = -2: 3.5 of 4
    assert membership_auc(forget=[-3, -2], holdout=[-1, -2]) == pytest.approx(3.5 / 4)


def test_auc_at_its_ends():
    remembered, unseen = [-1.0, -0.5], [-4.0, -3.0]
    assert membership_auc(forget=remembered, holdout=unseen) == 0
    assert membership_auc(forget=unseen, holdout=remembered) == 1
    assert membership_auc(forget=[-1.0] * 3, holdout=[-1.0] * 5) == 0.5


@cases
@given(scores, scores)
def test_auc_is_the_share_of_pairs(forget, holdout):
    pairs = [(h > f) + (h == f) / 2 for h in holdout for f in forget]
    assert membership_auc(forget, holdout) == pytest.approx(sum(pairs) / len(pairs))
    assert membership_auc(holdout, forget) == pytest.approx(1 - sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("forget", "holdout", "message"),
    [
        ([], [-1.0], "forget: got none"),
        ([-1.0], [], "holdout: got none"),
        ([math.nan], [-1.0], "forget: got NaN"),
        ([-1.0], [-math.inf], "holdout: got an infinite score"),
    ],
)
def test_auc_refuses(forget, holdout, message):
    with pytest.raises(UserError, match=message):
        membership_auc(forget, holdout)


@pytest.mark.parametrize("retrained", [0.4772, 0.5393])  # MUSE's News and Books
def test_privleak_with_published_references(retrained):
    assert privleak(0.0, retrained) == -100  # as before forgetting
    assert privleak(retrained, retrained) == 0
    assert privleak(1.0, retrained) == pytest.approx(100 * (1 / retrained - 1))


def test_privleak_by_hand():
    assert privleak(0.6, 0.5) == pytest.approx(20)
    assert privleak(0.4, 0.5) == pytest.approx(-20)


def test_privleak_without_a_retrained_model_says_how_to_make_one():
    with pytest.raises(
        UserError, match=r"retrained_auc: got none.*train .* on the retain set alone"
    ):
        privleak(0.5, None)


@pytest.mark.parametrize(
    ("auc", "retrained", "message"),
    [
        (math.nan, 0.5, "auc: got nan, expected 0 to 1"),
        (0.5, math.nan, "retrained_auc: got nan"),
        (47.0, 0.5, "auc: got 47.0"),
        (0.5, -0.1, "retrained_auc: got -0.1"),
        (0.5, 0.0, "retrained_auc: got 0, expected more"),
    ],
)
def test_privleak_refuses(auc, retrained, message):
    with pytest.raises(UserError, match=message):
        privleak(auc, retrained)

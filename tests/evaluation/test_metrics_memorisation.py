"""Memorisation at its floor and ceiling, and between them by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.errors import UserError
from bidistill.evaluation.metrics.memorisation import (
    exact_memorisation,
    extraction_strength,
    min_k_prob,
    perplexity,
)
from bidistill.evaluation.metrics.muse import membership_auc

cases = settings(deadline=None, derandomize=True, max_examples=60)
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("predicted", "exact", "strength"),
    [
        ([1, 2, 3, 4, 5], 1.0, 1.0),
        ([9, 2, 3, 4, 5], 0.8, 0.8),  # the first token is enough: k = 1
        ([1, 9, 3, 4, 5], 0.8, 0.6),
        ([9, 9, 9, 9, 5], 0.2, 0.2),  # k = 4: the last token matches
        ([9, 9, 9, 9, 9], 0.0, 0.0),  # nothing matches: not 1/5
        ([1, 2, 3, 4, 9], 0.8, 0.0),  # the end is wrong: there is no k below n
    ],
)
def test_by_hand(predicted, exact, strength):
    target = [1, 2, 3, 4, 5]
    assert exact_memorisation(predicted, target) == pytest.approx(exact)
    assert extraction_strength(predicted, target) == pytest.approx(strength)


@cases
@given(pairs)
def test_strength_by_definition(tokens):
    predicted, target = map(list, zip(*tokens, strict=True))
    n = len(target)
    k = next(k for k in range(n + 1) if predicted[k:] == target[k:])
    assert extraction_strength(predicted, target) == pytest.approx(1 - k / n)
    assert extraction_strength(predicted, target) <= exact_memorisation(predicted, target) + 1e-12


@pytest.mark.parametrize("metric", [exact_memorisation, extraction_strength])
def test_ids_are_refused(metric):
    with pytest.raises(UserError, match="target: got no token"):
        metric([], [])
    with pytest.raises(UserError, match=r"predicted: got 3 ids, expected 2"):
        metric([1, 2, 3], [1, 2])


def test_perplexity_by_hand():
    assert perplexity([math.log(1 / 50)] * 7) == pytest.approx(50)  # guessing among 50
    assert perplexity([0.0]) == 1
    # (1/2 * 1/8)^(-1/2) = 4
    assert perplexity([math.log(1 / 2), math.log(1 / 8)]) == pytest.approx(4)
    assert perplexity([-math.inf, -1.0]) == math.inf
    assert perplexity([-1000.0]) == math.inf


def test_min_k_by_hand():
    tokens = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert min_k_prob(tokens, k=0.4) == -4.5  # the lowest two: -5 and -4
    assert min_k_prob(tokens, k=0.2) == -5
    assert min_k_prob(tokens, k=0.5) == -4.5  # 2.5 tokens are two
    assert min_k_prob(tokens, k=1.0) == -3
    assert min_k_prob([-1.0, -math.inf, -1.0], k=0.4) == -math.inf


@cases
@given(st.lists(st.floats(-20, 0), min_size=5, max_size=12), st.randoms())
def test_min_k_properties(tokens, random):
    value = min_k_prob(tokens, k=0.4)
    assert min(tokens) - 1e-9 <= value <= min_k_prob(tokens, k=1.0) + 1e-9
    shuffled = random.sample(tokens, len(tokens))
    assert min_k_prob(shuffled, k=0.4) == pytest.approx(value)


def test_training_data_scores_higher_and_the_untouched_model_has_auc_zero():
    known, unseen = [-0.1] * 5, [-0.1, -0.1, -0.1, -6.0, -7.0]
    forget, holdout = min_k_prob(known, k=0.4), min_k_prob(unseen, k=0.4)
    assert forget > holdout
    assert membership_auc([forget], [holdout]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity([]), "token_log_probs: got none"),
        (lambda: perplexity([math.nan]), "token_log_probs: got NaN"),
        (lambda: perplexity([3.0]), "expected log-probabilities"),
        (lambda: min_k_prob([], k=0.4), "token_log_probs: got none"),
        (lambda: min_k_prob([-1.0, -2.0], k=0.4), r"got 2, expected at least 3 for k = 0.4"),
        (lambda: min_k_prob([-1.0], k=40), "k: got 40, expected a share"),
        (lambda: min_k_prob([-1.0], k=0), "k: got 0"),
        (lambda: min_k_prob([-1.0], k=math.nan), "k: got nan"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()

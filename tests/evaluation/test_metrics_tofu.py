"""TOFU's metrics against hand-computed values and against the numbers of its published logs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.errors import UserError
from bidistill.evaluation.metrics.tofu import (
    Utility,
    forget_quality,
    forget_truth,
    mean_log_prob,
    model_utility,
    probability,
    probability_among,
    rouge,
    truth_ratio,
    truth_share,
    utility_truth,
)

cases = settings(deadline=None, derandomize=True, max_examples=60)
log_probabilities = st.floats(-30, 0)
answers = st.lists(log_probabilities, min_size=1, max_size=6)
INF = math.inf


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def test_probability_is_the_geometric_mean():
    # (1/2 * 1/8)^(1/2) = 1/4; (1/2 * 1/4 * 1/8)^(1/3) = 1/4
    assert probability(logs(1 / 2, 1 / 8)) == pytest.approx(1 / 4)
    assert probability(logs(1 / 2, 1 / 4, 1 / 8)) == pytest.approx(1 / 4)
    assert mean_log_prob(logs(1 / 2, 1 / 8)) == pytest.approx(math.log(1 / 4))


def test_probability_at_floor_and_ceiling():
    assert probability([0.0, 0.0]) == 1
    assert probability([0.0, -INF]) == 0


@cases
@given(answers)
def test_probability_does_not_depend_on_length(tokens):
    assert probability(tokens * 3) == pytest.approx(probability(tokens))
    assert math.exp(min(tokens)) * (1 - 1e-12) <= probability(tokens) <= 1


def test_probability_among_by_hand():
    # the right one has 0.6 of all four: 1.2
    assert probability_among(math.log(0.6), logs(0.1, 0.2, 0.3)) == pytest.approx(0.5)
    assert probability_among(-INF, logs(0.1)) == 0
    assert probability_among(math.log(0.1), [-INF, -INF]) == 1
    assert probability_among(-2000.0, [-2000.0] * 3) == 1 / 4  # exp(-2000) is 0 in double precision


@cases
@given(log_probabilities, answers, st.floats(-9, 0))
def test_probability_among_sees_only_differences(right, wrong, shift):
    value = probability_among(right, wrong)
    assert 0 <= value <= 1
    shifted = probability_among(right + shift, [w + shift for w in wrong])
    assert shifted == pytest.approx(value)


def test_rouge_is_recall_with_stemming():
    # she write(s) -> "write", wrote stays, novel(s) -> "novel": 2 of 3, whatever else is said
    assert rouge("Of course she writes a novel.", "She wrote novels") == pytest.approx(2 / 3)
    assert rouge("", "She wrote novels") == 0


def test_truth_ratio_by_hand():
    # wrong answers 0.1 and 0.4: geometric mean 0.2, arithmetic 0.25; right one 0.5
    wrong = logs(0.1, 0.4)
    assert truth_ratio(math.log(0.5), wrong) == pytest.approx(0.4)
    assert truth_ratio(math.log(0.5), wrong, mean="arithmetic") == pytest.approx(0.5)


def test_truth_ratio_at_its_ends():
    assert truth_ratio(-1.0, [-INF, -1.0]) == 0  # one impossible answer makes the mean 0
    assert truth_ratio(-1.0, [-INF, -1.0], mean="arithmetic") == pytest.approx(0.5)
    assert truth_ratio(-INF, [-1.0]) == INF
    assert truth_ratio(-900.0, [-1.0]) == INF  # e^899
    assert truth_ratio(-1.0, [-900.0]) == 0


@cases
@given(log_probabilities, answers)
def test_truth_ratio_properties(right, wrong):
    ratio = truth_ratio(right, wrong)
    assert truth_ratio(right, wrong, mean="arithmetic") >= ratio * (1 - 1e-9)
    assert truth_ratio(right, wrong[::-1]) == pytest.approx(ratio)
    assert truth_ratio(right, [right] * 5) == pytest.approx(1)


@pytest.mark.parametrize(
    ("ratio", "forget", "utility", "share"),
    [
        (0.0, 0.0, 1.0, 1.0),
        (0.25, 0.25, 0.75, 0.8),  # 1 / 1.25
        (1.0, 1.0, 0.0, 0.5),
        (4.0, 0.25, 0.0, 0.2),  # 1 - 4 is cut at 0
        (INF, 0.0, 0.0, 0.0),
    ],
)
def test_truth_scores_by_hand(ratio, forget, utility, share):
    assert forget_truth(ratio) == forget
    assert utility_truth(ratio) == utility
    assert truth_share(ratio) == share


@cases
@given(st.floats(1e-6, 1e6))
def test_forget_truth_is_symmetric(ratio):
    assert forget_truth(1 / ratio) == pytest.approx(forget_truth(ratio))
    assert 0 <= forget_truth(ratio) <= 1


@pytest.mark.parametrize("score", [forget_truth, utility_truth, truth_share])
@pytest.mark.parametrize("ratio", [-0.1, math.nan])
def test_truth_scores_refuse_logs(score, ratio):
    with pytest.raises(UserError, match=r"ratio: got .*, expected a truth ratio, at least 0"):
        score(ratio)


def utility(probability=0.5, rouge=0.5, truth=0.5):
    return Utility(probability=probability, rouge=rouge, truth=truth)


def test_model_utility_of_published_logs():
    # the parts of Llama-2-7B trained on all of TOFU, from its logs, to four digits
    parts = [
        utility(0.9895, 0.9857, 0.4747),
        utility(0.4555, 0.9330, 0.5962),
        utility(0.4186, 0.8825, 0.5390),
    ]
    assert model_utility(*parts) == pytest.approx(0.6227, abs=5e-5)


def test_model_utility_by_hand():
    # 9 / (8 / 0.5 + 1 / 0.25) = 9 / 20
    assert model_utility(utility(), utility(truth=0.25), utility()) == pytest.approx(0.45)
    assert model_utility(utility(1, 1, 1), utility(1, 1, 1), utility(1, 1, 1)) == 1


@pytest.mark.parametrize("part", ["probability", "rouge", "truth"])
def test_one_zero_makes_model_utility_zero(part):
    assert model_utility(utility(), utility(), utility(**{part: 0.0})) == 0


def test_model_utility_refuses_percent_and_nan():
    with pytest.raises(UserError, match=r"real_authors: got 50, expected 0 to 1"):
        model_utility(utility(), utility(rouge=50), utility())
    with pytest.raises(UserError, match=r"world_facts: got NaN at 2"):
        model_utility(utility(), utility(), utility(truth=math.nan))


@pytest.mark.parametrize(("distance", "p_value"), [(119, 1.834e-21), (104, 2.194e-16)])
def test_forget_quality_of_published_logs(distance, p_value):
    """Full against retain90: statistic 0.397 (Llama-2) and 0.347 (Phi-1.5), 300 items each.

    The p-value depends on the statistic and the counts alone, so any samples that are shifted by
    as many items have it.
    """
    full, retrained = np.arange(300), np.arange(300) + distance - 0.5
    quality = forget_quality(full, retrained)
    assert quality.statistic == pytest.approx(distance / 300)
    assert quality.p_value == pytest.approx(p_value, rel=5e-4)


def test_forget_quality_by_hand():
    # no overlap: of the C(6, 3) = 20 orders of three and three, two are as extreme
    assert forget_quality([1, 2, 3], [4, 5, 6]).p_value == pytest.approx(0.1)
    assert forget_quality([1, 2, 3], [4, 5, 6]).statistic == 1
    same = forget_quality([0.5, 0.5, INF], [0.5, 0.5, INF])
    assert (same.p_value, same.statistic) == (1, 0)
    # one step apart: every order of five and five has a step
    nearly = forget_quality([1.0] * 5, [1.0] * 4 + [2.0])
    assert (nearly.p_value, nearly.statistic) == (pytest.approx(1), pytest.approx(0.2))


ratios = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0]), min_size=2, max_size=12)


@cases
@given(ratios, ratios)
def test_forget_quality_is_the_same_of_inverse_ratios(one, other):
    """TOFU's code tests 1/R: order turned round, distance and p-value are the same."""
    quality = forget_quality(one, other)
    assert 0 <= quality.p_value <= 1
    inverse = forget_quality(1 / np.array(one), 1 / np.array(other))
    assert inverse.statistic == pytest.approx(quality.statistic)
    assert inverse.p_value == pytest.approx(quality.p_value)


def test_forget_quality_without_a_retrained_model_says_how_to_make_one():
    with pytest.raises(
        UserError, match=r"retrained: got no .*; fine-tune .* on the retain set alone"
    ):
        forget_quality([0.5, 1.0], None)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([], [1.0], "ratios: got none"),
        ([1.0], [], "retrained: got none"),
        ([1.0, math.nan], [1.0], "ratios: got NaN at 1"),
        ([1.0], [-0.5], "retrained: got -0.5, expected ratios"),
    ],
)
def test_forget_quality_refuses(one, other, message):
    with pytest.raises(UserError, match=message):
        forget_quality(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probability([]), "token_log_probs: got none"),
        (lambda: probability([-1.0, math.nan]), "token_log_probs: got NaN at 1"),
        (lambda: probability([0.5]), "token_log_probs: got 0.5, expected log-probabilities"),
        (lambda: probability([[-1.0]]), r"token_log_probs: got shape \(1, 1\)"),
        (lambda: probability_among(-1.0, []), "wrong: got none"),
        (lambda: probability_among(-INF, [-INF]), "answers: got probability 0 for all"),
        (lambda: truth_ratio(0.2, [-1.0]), "paraphrase: got 0.2, expected log-probabilities"),
        (lambda: truth_ratio(-1.0, [0.2]), "wrong: got 0.2, expected log-probabilities"),
        (lambda: truth_ratio(-INF, [-INF]), "truth ratio: got probability 0 for right and wrong"),
        (lambda: truth_ratio(-1.0, [-1.0], mean="harmonic"), "mean: got 'harmonic'"),
    ],
)
def test_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_rounding_above_zero_is_taken_for_zero():
    assert probability([1e-4]) == 1

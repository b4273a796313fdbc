"""Means over items and what their intervals promise."""

import math

import numpy as np
import pytest

from bidistill.errors import UserError
from bidistill.evaluation.metrics.statistics import mean_over_items


def test_mean_and_normal_interval():
    """Of many items the interval is mean +- 1.96 standard errors; 1 % for resampling, seed 0."""
    values = np.random.default_rng(1).uniform(size=400)
    mean = mean_over_items(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (mean.value, mean.count) == (pytest.approx(values.mean()), 400)
    low, high = mean.ci95
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_two_items_by_hand():
    # draws of two: (0,0), (0,1), (1,0), (1,1), each in a quarter of the cases: 2.5 % reaches both
    assert mean_over_items([0.0, 1.0]).ci95 == (0.0, 1.0)


def test_same_seed_same_interval():
    values = np.random.default_rng(2).uniform(size=30)
    assert mean_over_items(values, seed=3) == mean_over_items(values, seed=3)
    assert mean_over_items(values, seed=3).ci95 != mean_over_items(values, seed=4).ci95


def test_interval_covers_the_truth_as_often_as_it_says():
    """Of 100 samples of 50 items, binomial with 0.95: fewer than 88 would be one in 300 runs."""
    random = np.random.default_rng(5)
    covered = 0
    for seed in range(100):
        low, high = mean_over_items(random.uniform(size=50), seed).ci95
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 99


def test_equal_items_have_no_width():
    assert mean_over_items([0.25] * 5).ci95 == (0.25, 0.25)


def test_one_item_has_no_interval():
    mean = mean_over_items([0.25])
    assert (mean.value, mean.count, mean.ci95) == (0.25, 1, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "values: got none"),
        ([0.5, math.nan], "values: got NaN at 1"),
        ([0.5, math.inf], "values: got an infinite one"),
        ([[0.5]], r"values: got shape \(1, 1\)"),
    ],
)
def test_refused(values, message):
    with pytest.raises(UserError, match=message):
        mean_over_items(values)

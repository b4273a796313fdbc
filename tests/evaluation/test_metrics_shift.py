"""The performance shift against the rows of DUET's table."""

import math
from dataclasses import replace

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.metrics.shift import DuetScores, performance_shift

BASE = DuetScores(forget=32.13, forget_500=39.99, retain=84.29, mmlu=61.46)


@pytest.mark.parametrize(
    ("scores", "shift"),
    [
        ((32.13, 39.99, 84.29, 61.46), 0.0),  # base
        ((0.00, 0.00, 0.00, 24.87), -48.76),  # gradient ascent: 72.12 - 84.29 - 36.59
        ((24.18, 26.83, 69.69, 54.79), -0.16),  # NPO
        ((0.47, 0.64, 58.33, 58.92), 42.51),  # FLAT
        ((4.27, 5.98, 78.33, 61.45), 55.90),  # DUET
    ],
)
def test_published_rows(scores, shift):
    names = ("forget", "forget_500", "retain", "mmlu")
    after = DuetScores(**dict(zip(names, scores, strict=True)))
    assert performance_shift(BASE, after) == pytest.approx(shift, abs=0.005)


def test_ideal_is_all_that_was_to_forget():
    ideal = replace(BASE, forget=0.0, forget_500=0.0)
    assert performance_shift(BASE, ideal) == pytest.approx(32.13 + 39.99)


@pytest.mark.parametrize(
    ("name", "sign"), [("forget", -1), ("forget_500", -1), ("retain", 1), ("mmlu", 1)]
)
def test_direction_of_each_score(name, sign):
    after = replace(BASE, **{name: getattr(BASE, name) + 2})
    assert performance_shift(BASE, after) == pytest.approx(2 * sign)


def test_nan_is_refused():
    with pytest.raises(UserError, match="after: got NaN at 3"):
        performance_shift(BASE, replace(BASE, mmlu=math.nan))
    with pytest.raises(UserError, match="base: got NaN at 0"):
        performance_shift(replace(BASE, forget=math.nan), BASE)

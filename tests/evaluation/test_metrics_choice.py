"""Multiple choice: right, wrong, tied, refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.errors import UserError
from bidistill.evaluation.metrics.choice import right_choice

cases = settings(deadline=None, derandomize=True, max_examples=60)
letters = st.lists(st.integers(-4, 0).map(float), min_size=2, max_size=5)


@pytest.mark.parametrize(
    ("answer", "score"),
    [(0, 0.0), (1, 1.0), (2, 0.0), (3, 0.0)],
)
def test_the_most_probable_letter_counts(answer, score):
    assert right_choice([-2.0, -0.5, -3.0, -math.inf], answer) == score


def test_ties_are_shared():
    assert right_choice([-1.0, -1.0, -2.0, -3.0], 0) == 0.5
    assert right_choice([-1.0, -1.0, -2.0, -3.0], 1) == 0.5
    assert right_choice([-1.0, -1.0, -2.0, -3.0], 2) == 0
    assert right_choice([-1.0] * 4, 3) == 0.25
    assert right_choice([-math.inf] * 4, 3) == 0.25


@cases
@given(letters, st.integers(0, 10))
def test_order_and_offset_do_not_matter(row, shift):
    scores = [right_choice(row, answer) for answer in range(len(row))]
    assert sum(scores) == pytest.approx(1)  # answers spread evenly: accuracy is chance
    lower = [value - shift for value in row]
    assert [right_choice(lower, answer) for answer in range(len(row))] == scores
    turned = [right_choice(row[::-1], answer) for answer in range(len(row))]
    assert turned == scores[::-1]


@pytest.mark.parametrize(
    ("row", "answer", "message"),
    [
        ([], 0, "letter_log_probs: got none"),
        ([-1.0], 0, "letter_log_probs: got one, expected two or more"),
        ([-1.0, math.nan], 0, "letter_log_probs: got NaN at 1"),
        ([-1.0, 12.5], 0, "letter_log_probs: got 12.5, expected log-probabilities"),
        ([-1.0] * 4, 4, "answer: got 4, expected 0 to 3"),
        ([-1.0] * 4, -1, "answer: got -1, expected 0 to 3"),
    ],
)
def test_refused(row, answer, message):
    with pytest.raises(UserError, match=message):
        right_choice(row, answer)

"""Rates over seeds and items, against values worked out by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.compare.estimate import difference, estimate
from bidistill.compare.measures import ATTACK, FORGET, PREFILL
from tests.compare.invented import item


def marks(values):
    return {"asked": {f"i{k:02d}": float(v) for k, v in enumerate(values)}}


def test_the_mean_is_over_seeds_and_the_interval_over_items():
    found = estimate([marks([1, 0, 0, 0]), marks([1, 1, 0, 0])])
    assert found is not None
    assert (found.value, found.seeds, found.count) == (0.375, (0.25, 0.5), 4)
    # per item the mean over seeds is 1, 1/2, 0, 0: a draw's mean is that of four of these
    low, high = found.ci95
    assert 0 <= low < 0.375 < high <= 0.875
    assert (8 * low) % 1 == (8 * high) % 1 == 0, "means of four values that are halves"


def test_more_seeds_do_not_narrow_the_interval():
    """Copies of one seed tell nothing about other items."""
    one, many = estimate([marks([1, 0, 0, 1])]), estimate([marks([1, 0, 0, 1])] * 9)
    assert one is not None
    assert many is not None
    assert many.ci95 == pytest.approx(one.ci95)


def test_agreement_is_no_certainty():
    """Wilson's upper end for 0 of 12: z^2 / (n + z^2)."""
    found = estimate([marks([0] * 12)] * 3)
    z2 = 1.959963984540054**2
    assert found is not None
    assert found.ci95 == pytest.approx((0, z2 / (12 + z2)))


def test_the_worst_column_counts():
    columns = {"1": {"a": 1.0, "b": 0.0}, "2": {"a": 1.0, "b": 1.0, "c": 0.0}}
    found = estimate([columns])
    assert found is not None
    assert found.value == pytest.approx(2 / 3)


def test_the_count_is_that_of_the_worst_column():
    """Deep prefilling leaves few facts open: six of six leak there, none of twelve elsewhere."""
    found = estimate([{"0": marks([0] * 12)["asked"], "16": marks([1] * 6)["asked"]}])
    z2 = 1.959963984540054**2
    assert found is not None
    assert (found.value, found.count) == (1, 6)
    assert found.ci95 == pytest.approx((6 / (6 + z2), 1)), "Wilson's for 6 of 6, not for 12 of 12"


def test_nothing_to_count_is_no_rate():
    assert estimate([{}]) is None
    assert difference([marks([1])], [{}]) is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=20))
def test_a_difference_is_paired(pairs):
    one, other = (marks([pair[k] for pair in pairs]) for k in (0, 1))
    found, back = difference([one], [other]), difference([other], [one])
    expected = sum(a - b for a, b in pairs) / len(pairs)
    assert found is not None
    assert back is not None
    assert math.isclose(found.value, expected, abs_tol=1e-12)
    assert back.value == pytest.approx(-found.value)
    if len({a - b for a, b in pairs}) == 1:
        assert found.ci95 == pytest.approx((expected, expected)), "no item says otherwise"


def test_only_common_items_are_compared():
    one, other = {"asked": {"a": 1.0, "b": 1.0}}, {"asked": {"b": 0.0, "c": 0.0}}
    found = difference([one], [other])
    assert found is not None
    assert found.value == 1


def test_an_attack_is_counted_as_the_attacks_count_it():
    """Prompts of one attempt must all leak, any attempt will do, and neither the model before an
    attack on its weights nor the plain question is an attack."""
    items = [
        item("forget", 0, leak=True, attack="format", attempt="choice"),
        item("forget", 0, leak=False, attack="format", attempt="choice"),
        item("forget", 0, leak=True, attack="format", attempt="cloze"),
        item("forget", 1, leak=True, attack="format", attempt="choice"),
        item("forget", 1, leak=False, attack="format", attempt="choice"),
        item("forget", 2, leak=True, attack="format", attempt="cloze") | {"leak": None},
        item("forget", 1, leak=True, attack="relearn", attempt="untouched"),
        item("forget", 1, leak=False, attack="relearn", attempt="1 steps"),
        item("forget", 1, leak=True, attack="plain", attempt="asked"),
    ]
    assert ATTACK.columns([], items) == {
        "format": {"forget/0": 1.0, "forget/1": 0.0},
        "relearn": {"forget/1": 0.0},
    }


def test_what_the_prefill_had_said_is_not_counted():
    items = [
        item("forget", 0, leak=True),
        item("forget", 0, leak=True, depth=2) | {"leak": None},
        item("neighbor", 0, leak=True),
    ]
    assert FORGET.columns(items, []) == {"asked": {"forget/0": 1.0}}
    assert PREFILL.columns(items, []) == {"0": {"forget/0": 1.0}}

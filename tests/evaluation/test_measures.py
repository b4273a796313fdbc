"""Numbers of measures by hand, their intervals, and differences of paired items."""

import math

import numpy as np
import pytest

from bidistill.errors import UserError
from bidistill.evaluation.axes import Rate
from bidistill.evaluation.measures import Meaning, mean_of, missing, statistic_of
from bidistill.evaluation.metrics.statistics import mean_over_items

MEANING = Meaning(unit="share", ideal=1.0, good="high")


def items(*scores, start=0):
    return [{"id": f"x/{start + i}", "scores": {"s": s}} for i, s in enumerate(scores)]


def test_a_mean_with_its_interval():
    measure = mean_of(MEANING, items(0.0, 1.0, 1.0, 0.0), "s")
    assert measure.summary() == {
        "value": 0.5,
        "n": 4,
        "ci95": list(mean_over_items([0, 1, 1, 0]).ci95),  # type: ignore
        "unit": "share",
        "ideal": 1.0,
        "arrow": "↑",
    }


def test_a_share_has_an_interval_even_without_a_hit():
    share = Meaning(unit="share of items", ideal=0.0, good="low", share=True)
    assert mean_of(share, items(0.0, 0.0, 0.0), "s").interval() == Rate(0, 3).interval()
    assert mean_of(share, items(1.0), "s").interval() == Rate(1, 1).interval()
    base = mean_of(share, items(1.0, 0.0, 0.0), "s")
    assert mean_of(share, items(0.0, 0.0, 0.0), "s").difference(base)["ci95"] == [-1, 0]


def test_items_without_a_score_are_left_out_and_counted():
    summary = mean_of(MEANING, items(1.0, None, 0.0, None), "s").summary()
    assert (summary["value"], summary["n"]) == (0.5, 2)
    assert summary["note"] == "2 of 4 items cannot be scored"


def test_nothing_measured_is_no_number():
    for measure in (missing(MEANING, "no file"), mean_of(MEANING, [], "s")):
        summary = measure.summary()
        assert (summary["value"], summary["n"], summary["ci95"]) == (None, 0, None)
    assert missing(MEANING, "no file").summary()["note"] == "no file"
    assert mean_of(MEANING, items(1.0), "s").summary()["ci95"] is None


def test_a_paired_difference_is_narrower_than_its_parts():
    own = mean_of(MEANING, items(*np.linspace(0, 1, 50)), "s")
    base = mean_of(MEANING, items(*(np.linspace(0, 1, 50) + 0.1)), "s")
    apart = own.difference(base)
    assert apart["value"] == pytest.approx(-0.1)
    low, high = apart["ci95"]
    assert high - low < 1e-6
    wide = own.interval()
    assert wide is not None
    assert wide[1] - wide[0] > 0.1


def test_other_items_cannot_be_paired():
    own, base = (mean_of(MEANING, items(1.0, 0.0, start=at), "s") for at in (0, 1))
    with pytest.raises(UserError, match="items: got 2 of one model and 2 others"):
        own.difference(base)
    assert own.difference(missing(MEANING, "no file")) == {"value": None, "ci95": None}


def geometric(*sets):
    """Of the means of sets; a difference of it is no mean over items."""
    return math.exp(np.mean([math.log(rows.mean()) for rows in sets]))


def test_a_statistic_of_several_sets():
    one, other = items(0.2, 0.6), items(0.8, 1.0, start=2)
    measure = statistic_of(MEANING, [one, other], ["s"], geometric)
    assert measure.value == pytest.approx(math.sqrt(0.4 * 0.9))
    # 4 draws of the first set times 4 of the second: the ends are the extreme ones
    interval = measure.interval()
    assert interval == pytest.approx([math.sqrt(0.2 * 0.8), math.sqrt(0.6 * 1.0)])
    assert measure.summary()["n"] == 4


def test_the_difference_of_a_statistic_draws_both_models_alike():
    own = statistic_of(MEANING, [items(0.2, 0.6, 0.9)], ["s"], lambda rows: rows.sum())
    apart = own.difference(own)
    assert apart == {"value": 0.0, "ci95": [0.0, 0.0]}
    base = statistic_of(MEANING, [items(0.1, 0.5, 0.8)], ["s"], lambda rows: rows.sum())
    assert own.difference(base)["value"] == pytest.approx(0.3)
    assert own.difference(base)["ci95"] == pytest.approx([0.3, 0.3])

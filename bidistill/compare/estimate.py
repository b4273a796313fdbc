"""Rates of a method over seeds, with intervals over items, and the difference of two methods.

Seeds are not items: all seeds answer the same questions, so a draw of items is a draw for all of
them, and what seeds do stands beside the interval, one by one.

Legend: I items, B draws, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import binomtest

from bidistill.compare.measures import Columns

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rate of one method."""

    value: float
    """Mean over seeds."""
    seeds: tuple[float, ...]
    """Of each seed."""
    count: int
    """Items counted, of the worst column; of the seed where they are fewest."""
    ci95: tuple[float, float]
    """Of the mean over seeds, for other items of the same kind: bootstrap over items. Where all
    items of all seeds agree, which a bootstrap takes for certainty, Wilson's for one seed."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher the rate of one method is than that of another, on the same items."""

    value: float
    ci95: tuple[float, float]
    """Paired bootstrap over items."""


def estimate(seeds: Sequence[Columns]) -> Estimate | None:
    """Estimate the rate of a method.

    Args:
        seeds: what its cells' replies were marked, a set of columns for each.

    Returns:
        None if there is no item to count.
    """
    items = _items(seeds)
    if not items:
        return None
    values = tuple(float(_rates(columns, items, np.ones((1, len(items))))[0]) for columns in seeds)
    count = min(_count(columns) for columns in seeds)
    mean = float(np.mean(values))
    low, high = _middle(_draws(seeds, items))
    if low == high:
        wilson = binomtest(round(mean * count), count).proportion_ci(LEVEL, method="wilson")
        low, high = float(wilson.low), float(wilson.high)
    return Estimate(mean, values, count, (low, high))


def difference(one: Sequence[Columns], other: Sequence[Columns]) -> Difference | None:
    """Compare two methods on the items that both were asked.

    Args:
        one: of the method whose rate is taken from.
        other: of the method whose rate is taken away.

    Returns:
        None if they have no item in common.
    """
    items = sorted({*_items(one)} & {*_items(other)})
    if not items:
        return None
    whole = np.ones((1, len(items)))
    values = [
        np.mean([_rates(columns, items, whole)[0] for columns in side]) for side in (one, other)
    ]
    draws = _draws(one, items) - _draws(other, items)
    return Difference(float(values[0] - values[1]), _middle(draws))


def _middle(draws: Float64[np.ndarray, " B"]) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the draws."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _items(seeds: Sequence[Columns]) -> list[str]:
    """Ids of all items that any seed counts, in a fixed order."""
    return sorted({name for columns in seeds for marks in columns.values() for name in marks})


def _count(columns: Columns) -> int:
    """Items of the worst column; of equals the one with more items, as in a summary."""
    return max(
        (sum(marks.values()) / len(marks), len(marks)) for marks in columns.values() if marks
    )[1]


def _draws(seeds: Sequence[Columns], items: Sequence[str]) -> Float64[np.ndarray, " B"]:
    """The mean over seeds for each draw of items; methods with the same items share the draws."""
    size = len(items)
    weights_BI = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), DRAWS)
    drawn = np.stack([_rates(columns, items, weights_BI) for columns in seeds])
    return drawn.mean(0)


def _rates(
    columns: Columns, items: Sequence[str], weights_BI: Float64[np.ndarray, "B I"]
) -> Float64[np.ndarray, " B"]:
    """The rate of the worst column, for each weighting of the items."""
    rates = [_rate(marks, items, weights_BI) for marks in columns.values() if marks]
    return np.fmax.reduce(rates)  # NaN only where all are


def _rate(
    marks: Mapping[str, float], items: Sequence[str], weights_BI: np.ndarray
) -> Float64[np.ndarray, " B"]:
    """Weighted mean of the marks of one column; NaN for a draw without any of its items."""
    value_I = np.array([marks.get(item, 0.0) for item in items])
    counts_I = np.array([float(item in marks) for item in items])
    with np.errstate(invalid="ignore"):
        return (weights_BI @ value_I) / (weights_BI @ counts_I)

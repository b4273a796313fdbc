"""The mean over items, with the interval that other items of the same kind would fall into."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bidistill.errors import UserError
from bidistill.evaluation.metrics.checks import numbers

LEVEL = 0.95
RESAMPLES = 9999
BATCH = 1000
"""Resamples held at once: 8 kB an item."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over items."""

    value: float
    count: int
    ci95: tuple[float, float] | None
    """Bootstrap interval; None for one item, which says nothing about the next."""


def mean_over_items(values: ArrayLike, seed: int = 0) -> Mean:
    """Average a score over items, with its 95 % bootstrap interval.

    Items are drawn again with replacement, and the interval holds the middle 95 % of the means
    (percentile method of scipy.stats.bootstrap). It speaks of other items of the same kind, not of
    other training seeds. Of two models on the same items, pass the differences per item: apart,
    their intervals are too wide for that. Where all items score alike the interval has no
    width; shares of yes and no are better served by `bidistill.evaluation.axes.Rate`.

    Args:
        values: one finite score an item.
        seed: of the draws; the same gives the same interval.

    Raises:
        UserError: there is no item, or a score is not finite.
    """
    row = numbers(values, "values")
    if np.isinf(row).any():
        raise UserError(
            "values: got an infinite one, expected finite scores; average a bounded score instead, "
            "such as forget_truth of a truth ratio"
        )
    return Mean(float(row.mean()), len(row), _interval(row, seed) if len(row) > 1 else None)


def _interval(row: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap  # a second to import, and only needed here

    ci = bootstrap(
        (row,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=BATCH,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(ci.low), float(ci.high)

"""What a benchmark found: a number with its count, its interval, its unit and what would be ideal.

A measure keeps the scores of its items, so that two models can be compared item by item: of their
difference the interval is far narrower than the two apart suggest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bidistill.errors import UserError
from bidistill.evaluation.axes import Rate
from bidistill.evaluation.metrics.statistics import LEVEL, mean_over_items

Item = dict[str, Any]
"""One item of a benchmark: id, benchmark, set, prompt_sha256, reply (None where nothing was
written) and scores by name (None where the item cannot be scored)."""

Statistic = Callable[..., float]
"""A number of arrays, one for each set, whose rows are items."""

ARROWS = {"low": "↓", "high": "↑", "ideal": "→"}
RESAMPLES = 1000
"""For what is no mean; scipy does not resample several sets together, so each takes a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """How to read a number."""

    unit: str
    ideal: float | str
    """The best value, or whose value it is."""
    good: Literal["low", "high", "ideal"]
    """Whether lower or higher is better, or nearer to the ideal."""
    share: bool = False
    """Of yes and no: the interval is Wilson's, since a bootstrap of no hit at all has no width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A number and what it was made of."""

    meaning: Meaning
    ids: tuple[str, ...] = ()
    """Of the items, over all sets."""
    sets: tuple[np.ndarray, ...] = ()
    """Scores, a row for each item. Shape (items, scores) each; none: not measured."""
    statistic: Statistic | None = None
    """Of the sets; None: the mean of the only one, which has one score an item."""
    resample: bool = True
    """Whether an interval makes sense."""
    why: str = ""
    """Why it was not measured, or left out items."""

    @property
    def value(self) -> float | None:
        """The number itself; None if not measured."""
        return self._of(self.sets) if self.sets else None

    def summary(self) -> dict[str, Any]:
        """For ``metrics.json``: value, n, ci95, unit, ideal, arrow, and a note if there is one.

        ``ci95`` is a bootstrap over items, of shares of yes and no Wilson's interval.
        """
        note = {"note": self.why} if self.why else {}
        return {
            "value": self.value,
            "n": len(self.ids),
            "ci95": self.interval(),
            "unit": self.meaning.unit,
            "ideal": self.meaning.ideal,
            "arrow": ARROWS[self.meaning.good],
            **note,
        }

    def interval(self) -> list[float] | None:
        """The 95 % interval; None where there is none."""
        if self.sets and self.meaning.share:
            return Rate(int(self.sets[0].sum()), len(self.sets[0])).interval()
        if not self._can_resample():
            return None
        if self.statistic is None:
            ci95 = mean_over_items(self.sets[0][:, 0]).ci95
            return None if ci95 is None else list(ci95)
        return self._resampled(self._of)

    def difference(self, base: "Measure") -> dict[str, Any]:
        """How far this is from the same measure of another model, items paired.

        Returns:
            ``value`` and ``ci95`` of this minus ``base``; None where one was not measured.

        Raises:
            UserError: the two are not of the same items.
        """
        if not self.sets or not base.sets:
            return {"value": None, "ci95": None}
        if self.ids != base.ids:
            raise UserError(
                f"items: got {len(self.ids)} of one model and {len(base.ids)} others of the other, "
                "expected the same; evaluate both with the same command"
            )
        if self.statistic is None:
            paired = mean_over_items(self.sets[0][:, 0] - base.sets[0][:, 0])
            return {"value": paired.value, "ci95": paired.ci95 and list(paired.ci95)}

        both = tuple(np.hstack(pair) for pair in zip(self.sets, base.sets, strict=True))
        widths = [one.shape[1] for one in self.sets]

        def apart(sets: Sequence[np.ndarray]) -> float:
            own = self._of([both[:, :w] for both, w in zip(sets, widths, strict=True)])
            return own - self._of([both[:, w:] for both, w in zip(sets, widths, strict=True)])

        joined = Measure(meaning=self.meaning, ids=self.ids, sets=both, resample=self.resample)
        ci95 = joined._resampled(apart) if joined._can_resample() else None
        return {"value": apart(both), "ci95": ci95}

    def _of(self, sets: Sequence[np.ndarray]) -> float:
        return float(sets[0].mean()) if self.statistic is None else float(self.statistic(*sets))

    def _can_resample(self) -> bool:
        """One item says nothing about the next."""
        return self.resample and bool(self.sets) and min(map(len, self.sets)) > 1

    def _resampled(self, value: Callable[[Sequence[np.ndarray]], float]) -> list[float]:
        """Percentiles of a number over draws of items, each set for itself."""
        rng = np.random.default_rng(0)
        drawn = [
            value([rows[rng.integers(len(rows), size=len(rows))] for rows in self.sets])
            for _ in range(RESAMPLES)
        ]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return [float(low), float(high)]


def mean_of(meaning: Meaning, items: Sequence[Item], score: str) -> Measure:
    """The mean of a score over items; those without it are left out, and the note says how many."""
    scored = [item for item in items if item["scores"][score] is not None]
    missing = len(items) - len(scored)
    why = f"{missing} of {len(items)} items cannot be scored" if missing else ""
    return Measure(meaning=meaning, **_rows(scored, [score]), why=why)


def statistic_of(
    meaning: Meaning,
    sets: Sequence[Sequence[Item]],
    scores: Sequence[str],
    statistic: Statistic,
    *,
    resample: bool = True,
) -> Measure:
    """A number of several scores of one or more sets of items; all items must have them."""
    rows = [_rows(items, scores) for items in sets]
    return Measure(
        meaning=meaning,
        ids=tuple(id for row in rows for id in row["ids"]),
        sets=tuple(array for row in rows for array in row["sets"]),
        statistic=statistic,
        resample=resample,
    )


def missing(meaning: Meaning, why: str) -> Measure:
    """A measure that was not made, and why."""
    return Measure(meaning=meaning, why=why)


def _rows(items: Sequence[Item], scores: Sequence[str]) -> dict[str, Any]:
    """Ids and scores of items; no array where there is no item."""
    values = np.array([[i["scores"][s] for s in scores] for i in items], dtype=np.float64)
    return {"ids": tuple(item["id"] for item in items), "sets": (values,) if items else ()}

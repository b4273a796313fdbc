"""From the files of the cells to the rows of the table, and what they say together."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bidistill.compare.cells import ATTACKS, ITEMS, METRICS, RESULTS, Cell
from bidistill.compare.estimate import Difference, Estimate, difference, estimate
from bidistill.compare.measures import (
    ATTACK,
    AXES,
    FORGET,
    MEASURES,
    NEIGHBOR,
    PREFILL,
    Columns,
    Measure,
)
from bidistill.compare.recipe import BASE, CompareConfig, Limits
from bidistill.data.jsonl import read_objects
from bidistill.errors import UserError
from bidistill.evaluation.axes import Item

ROUNDING = 1e-9
"""Rates that differ by less are equal."""


@dataclass(frozen=True, slots=True)
class Replies:
    """What one cell said, and what it took."""

    seed: int | None
    items: list[Item]
    attacks: list[Item]
    metrics: dict[str, Any]

    @classmethod
    def of(cls, cell: Cell) -> "Replies":
        """Read the files of a cell that is done.

        Raises:
            UserError: one of them is missing or damaged.
        """
        items, attacks = (_lines(cell.folder / name) for name in (ITEMS, ATTACKS))
        path = cell.folder / METRICS
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            metrics = None
        if not isinstance(metrics, dict) or not metrics.keys() >= RESULTS:
            raise UserError(
                f"{path}: got a damaged file, or that of another version, expected the results of "
                "a cell; delete it to have them made again"
            )
        return cls(cell.seed, items, attacks, metrics)


class Row:
    """One method with all of its seeds."""

    def __init__(self, name: str, cells: Sequence[Replies], note: str = "") -> None:
        """Mark the replies of each cell."""
        self.name = name
        self.cells = list(cells)
        self.note = note
        self.columns: dict[str, list[Columns]] = {
            measure.key: [measure.columns(cell.items, cell.attacks) for cell in cells]
            for measure in MEASURES
        }

    @cached_property
    def estimates(self) -> dict[str, Estimate | None]:
        """By the key of the measure; None where there is nothing to count."""
        return {key: estimate(seeds) for key, seeds in self.columns.items()}

    @cached_property
    def attacks(self) -> dict[str, Estimate | None]:
        """Leaks under each attack by itself, by its name."""
        seeds = self.columns[ATTACK.key]
        names = dict.fromkeys(name for columns in seeds for name in columns)
        return {
            name: estimate([{name: columns.get(name, {})} for columns in seeds]) for name in names
        }

    def value(self, measure: Measure) -> float | None:
        """The rate over all seeds."""
        found = self.estimates[measure.key]
        return None if found is None else found.value

    def less(self, other: "Row", measure: Measure) -> Difference | None:
        """How much higher a rate is here than there."""
        return difference(self.columns[measure.key], other.columns[measure.key])

    def cost(self) -> "Cost":
        """What a cell of it took, on average."""
        return Cost.of([cell.metrics for cell in self.cells])

    def axes(self, base: "Row") -> dict[str, float | None]:
        """The five axes, each from 0 to 1, 1 being best.

        What is to be kept is a share of what the model knew before; of an axis with several
        measures the worst counts.
        """
        found: dict[str, float | None] = {}
        for axis, measures in AXES.items():
            values = [_goodness(self, base, measure) for measure in measures]
            known = [value for value in values if value is not None]
            found[axis] = min(known, default=None)
        return found


@dataclass(frozen=True, slots=True)
class Cost:
    """Means over cells; None where nothing was trained."""

    train_seconds: float | None
    tokens: float | None
    steps: float | None
    peak_mib: float
    """Of the whole process, training and evaluation."""
    measure_seconds: float
    """Questions and attacks."""

    @classmethod
    def of(cls, metrics: Sequence[dict[str, Any]]) -> "Cost":
        """Of the metrics of some cells."""
        costs = [m["cost"] for m in metrics if m["cost"] is not None]

        def mean(key: str) -> float | None:
            return float(np.mean([cost[key] for cost in costs])) if costs else None

        return cls(
            mean("seconds"),
            mean("tokens"),
            mean("steps"),
            float(np.mean([m["peak_bytes"] for m in metrics])) / 2**20,
            float(np.mean([m["seconds"]["ask"] + m["seconds"]["attack"] for m in metrics])),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who keeps most among those that forget."""

    sentence: str
    good: bool
    """Whether it is the method that the comparison is about."""
    reached: tuple[str, ...]
    """Names of the methods within the limits, best held-out neighbours first."""


def rows_of(config: CompareConfig, cells: Sequence[Cell]) -> list[Row]:
    """The rows of all methods that have a cell that is done, the base model first."""
    rows = []
    for name in (BASE, *config.methods):
        done = [Replies.of(cell) for cell in cells if cell.method == name and cell.done]
        if done:
            note = config.methods[name].note if name in config.methods else ""
            rows.append(Row(name, done, note))
    return rows


def made_with(rows: Sequence[Row]) -> dict[str, str]:
    """Commit, versions and threads of the cells; all that there are, where cells differ."""
    found: dict[str, dict[str, None]] = {}
    for metrics in (cell.metrics for row in rows for cell in row.cells):
        facts = {"commit": metrics["commit"], **metrics["versions"], "threads": metrics["threads"]}
        for name, value in facts.items():
            found.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(values) for name, values in found.items()}


def within(row: Row, limits: Limits) -> bool:
    """Whether a method forgets as much as the limits ask for."""
    forget, prefill = row.value(FORGET), row.value(PREFILL)
    if forget is None or prefill is None:
        return False
    return forget <= limits.forget_leak_rate and prefill <= limits.prefill_leak_rate


def verdict(rows: Sequence[Row], ours: str, limits: Limits) -> Verdict:
    """Rank the methods within the limits by the held-out neighbours that they keep."""
    for group, measure in (("forget", FORGET), ("neighbor", NEIGHBOR)):
        if rows[0].value(measure) is None:
            return Verdict(f"No verdict: no probe of group {group} was asked.", False, ())
    reached = [
        row
        for row in rows
        if row.name != BASE and within(row, limits) and row.value(NEIGHBOR) is not None
    ]
    reached.sort(key=lambda row: (-round(row.value(NEIGHBOR) or 0.0, 9), row.name != ours))
    names = tuple(row.name for row in reached)
    bounds = (
        f"forget_leak_rate ≤ {limits.forget_leak_rate:.2f} and "
        f"prefill_leak_rate.max ≤ {limits.prefill_leak_rate:.2f}"
    )
    if ours not in names:
        best = f"; best of those that do: {names[0]}" if names else "; no method does"
        return Verdict(f"{ours} does not reach {bounds}{best}.", False, names)
    mine = next(row for row in reached if row.name == ours)
    others = [row for row in reached if row is not mine]
    kept = f"{ours} keeps {mine.value(NEIGHBOR):.3f} of the held-out neighbours"
    among = f"of {len(names)} methods with {bounds}"
    if not others:
        return Verdict(f"{kept}; no other method reaches {bounds}.", True, names)
    rival = others[0]
    gap = mine.less(rival, NEIGHBOR)
    assert gap is not None, "both were asked about neighbours"
    by = f"{abs(gap.value):.3f}, paired 95 % interval {gap.ci95[0]:+.3f} to {gap.ci95[1]:+.3f}"
    if gap.value < -ROUNDING:
        text = f"{kept}; {among}, {rival.name} keeps more ({rival.value(NEIGHBOR):.3f}; by {by})."
        return Verdict(text, False, names)
    if gap.value <= ROUNDING:
        return Verdict(f"{kept}, the most {among}, as many as {rival.name} ({by}).", True, names)
    return Verdict(f"{kept}, the most {among}; next is {rival.name} (by {by}).", True, names)


def _goodness(row: Row, base: Row, measure: Measure) -> float | None:
    """A rate so that 1 is best: turned round where low is good, else a share of the base's."""
    value, before = row.value(measure), base.value(measure)
    if value is None:
        return None
    if measure.good == "low":
        return 1 - value
    return min(1.0, value / before) if before else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [item for _, item in read_objects(path)]


def replies_by_question(rows: Sequence[Row]) -> Mapping[tuple[str, str, str], dict[str, Item]]:
    """What each method says to each plain or prefilled question, by its first seed.

    Returns:
        By group, id and prefill of the question, then by name of the method.
    """
    found: dict[tuple[str, str, str], dict[str, Item]] = {}
    for row in rows:
        for item in row.cells[0].items:
            key = item["group"], item["id"], item["prefill"]
            found.setdefault(key, {})[row.name] = item
    return found

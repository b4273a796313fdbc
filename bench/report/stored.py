"""Stored results: which files count, and what a file says about its run.

Of each suite the newest file of each device counts; older ones stay for whoever compares, and so do
those of a part of a suite.

Providers of a case take turns, so sample i of each is from the same moment. What slows the machine
down for a while slows all of them, and is not in the ratios of a turn.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import record
from bench.gpu.table import FLOOR, OURS, ratio
from bench.loading import THEIRS
from bench.meter import Ceilings

Record = dict[str, Any]
RESULTS = record.ROOT / "bench" / "results"
CASES = ("case", "scaling")
PART = "-part"
RATES = Ceilings._fields
AUTO = {"cpu": "native", "cuda": "triton"}


class Spread(NamedTuple):
    """A number, and what lies around it; all three are the same where only one is known."""

    middle: float
    low: float
    high: float
    """From 20 to 80 %."""

    @classmethod
    def of(cls, value: float | None) -> "Spread | None":
        return None if value is None else cls(value, value, value)


class Run(NamedTuple):
    """A result file that counts."""

    letter: str
    """How the page refers to it."""
    content: dict[str, Any]
    """As `bench.record.load` reads it."""

    @property
    def path(self) -> Path:
        return Path(self.content["path"])

    @property
    def device(self) -> str:
        return device_of(self.content)

    @property
    def records(self) -> list[Record]:
        return self.content["records"]

    @property
    def ceilings(self) -> Ceilings:
        """The best of all times that the ceilings were measured: none is reached by luck."""
        known = self.content["ceilings"]
        best = {name: max((c.get(name) or 0.0 for c in known), default=0.0) for name in RATES}
        return Ceilings(**{name: rate or None for name, rate in best.items()})

    def drift(self, ceiling: str = "mm_flops_per_s") -> float:
        """Relative change of a ceiling within the run."""
        known = [c[ceiling] for c in self.content["ceilings"] if c.get(ceiling)]
        return abs(known[-1] / known[0] - 1) if known else 0.0


def stored_runs(folder: Path = RESULTS) -> list[Run]:
    """Return the newest run of each device and suite: CPU first, then by name and suite."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = record.load(path)
        if suite_of(content).endswith(PART):
            continue
        key = device_of(content), name_of(content), suite_of(content)
        # the date of the run, not of the file: a checkout gives every file its own
        if key not in newest or newest[key]["started_utc"] <= content["started_utc"]:
            newest[key] = content
    chosen = [newest[key] for key in sorted(newest)]
    return [Run(_letter(index), content) for index, content in enumerate(chosen)]


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def suite_of(content: dict[str, Any]) -> str:
    """Name of what was run; the GPU script's files have none."""
    return content.get("suite") or "gpu"


def device_of(content: dict[str, Any]) -> str:
    """Return "cpu" or "cuda"."""
    # the GPU script's files do not say it; it stores nothing where there is no GPU
    return content.get("device", "cuda")


def name_of(content: dict[str, Any]) -> str:
    """Name of the accelerator; a CPU has none."""
    known = content["environment"]["device"] if device_of(content) == "cuda" else None
    return (known or {}).get("name", "")


def groups(records: list[Record], *kinds: str) -> Iterator[list[Record]]:
    """Yield the records of each case, in the order they were measured."""
    found: dict[str, list[Record]] = {}
    for one in records:
        if one["kind"] in kinds:
            found.setdefault(title(one), []).append(one)
    yield from found.values()


def title(one: Record) -> str:
    """Name a case so that no two of a run share one: words, head or its shape, and dtype."""
    words = [one["case"]]
    if "V" in one and not one.get("head"):
        words += [f"{k}={one[k]}" for k in "VD" if f"{k}=" not in one["case"]]
    elif one.get("head") and one["head"] not in one["case"]:
        words.append(one["head"])
    return ", ".join([*words, *filter(None, [one.get("dtype")])])


def is_ours(one: Record) -> bool:
    return one["provider"].split(",")[0] == OURS


def is_floor(one: Record) -> bool:
    return one["provider"] == FLOOR


def extra_bytes(one: Record) -> int | None:
    """Peak memory beyond inputs and gradients."""
    peak = one.get("peak_bytes")
    return None if peak is None else peak - (one.get("gradient_bytes") or 0)


def ours(records: list[Record], device: str) -> Record | None:
    """The back-end that `auto` picks, whatever came of it; steps and the GPU script name none."""
    at = {r["provider"]: r for r in records}
    return at.get(f"{OURS}, {AUTO[device]}") or at.get(OURS)


def computes(one: Record) -> str:
    """Say so where a peer computes another loss than the case's."""
    return f" (computes {one['computes']})" if one.get("computes") else ""


def turns(one: Record, other: Record) -> list[float]:
    """How many times longer one provider took than another, turn by turn.

    Empty if they have not the same number of samples: then nothing tells which belong together.
    """
    pair = [r.get("samples_ms") or [] for r in (one, other)]
    return [a / b for a, b in zip(*pair, strict=True)] if len(pair[0]) == len(pair[1]) else []


def times(one: Record | None, other: Record | None) -> Spread | None:
    """How many times longer one provider takes than another: the median of the turns, or else the
    ratio of the medians."""
    if one is None or other is None:
        return None
    known = turns(one, other)
    if not known:
        return Spread.of(ratio(one.get("median_ms"), other.get("median_ms")))
    return Spread(*np.quantile(known, (0.5, 0.2, 0.8)).tolist())


def base(records: list[Record]) -> Record | None:
    """What the times of a case are set against: the floor, or who stands in where there is none."""
    provider = {"step": "eager", "loading": THEIRS}.get(records[0]["kind"], FLOOR)
    return next((r for r in records if r["provider"] == provider), None)

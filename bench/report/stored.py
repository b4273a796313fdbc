"""Stored results: which files count, and what a file says about its run.

Of each suite the newest file of each kind of device counts; older ones stay for whoever compares.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import record
from bench.gpu.table import FLOOR, OURS

Record = dict[str, Any]
RESULTS = record.ROOT / "bench" / "results"
CASES = ("case", "scaling")


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
    def drift(self) -> float:
        """Relative change of the ceilings within the run, the larger of the two.

        A difference of times that is no larger is none.
        """
        known = self.content["ceilings"]
        if len(known) < 2:
            return 0.0
        first, last = known[0], known[-1]
        keys = [k for k in ("mm_flops_per_s", "copy_bytes_per_s") if first.get(k) and last.get(k)]
        return max((abs(last[k] / first[k] - 1) for k in keys), default=0.0)


def stored_runs(folder: Path = RESULTS) -> list[Run]:
    """Return the newest run of each (suite, kind of device): CPU first, then by suite."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = record.load(path)
        key = device_of(content), suite_of(content)
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


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def time_of(records: list[Record], provider: str) -> float | None:
    """Median time in ms of a provider of a case."""
    return next((r.get("median_ms") for r in records if r["provider"] == provider), None)


def base_ms(records: list[Record]) -> float | None:
    """What the times of a case are set against: the floor's; of a step, which has none, eager's."""
    provider = "eager" if records[0]["kind"] == "step" else FLOOR
    return time_of(records, provider)

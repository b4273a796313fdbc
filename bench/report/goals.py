"""The bounds that the native back-end was given on the CPU, beside what was measured.

All are for the head of SmolLM2-135M in fp32. Those for CUDA stand in `bench/gpu/table.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

from bench.report import stored
from bench.report.stored import Record, Run, Spread

HEAD, DTYPE = "SmolLM2-135M", "float32"
MIB = 2**20
NAMES = {
    "bidirectional_kl": "KL",
    "jsd": "JSD",
    "cross_entropy": "CE",
    "push_pull": "push-pull, head frozen",
}


class Goal(NamedTuple):
    """A bound on a number of a case."""

    text: str
    loss: str
    N: int
    measure: Callable[[list[Record]], Spread | None]
    bound: float
    at_most: bool = True


class Outcome(NamedTuple):
    """A goal and what came of it."""

    goal: Goal
    run: Run | None = None
    measured: Spread | None = None
    status: str = "right"
    """What came of ours."""

    @property
    def word(self) -> str:
        if self.status == "not installed":
            return "not measured: not installed"
        if self.status != "right":
            return f"**MISSED**: {self.status}"
        if self.measured is None:
            return "not measured"
        value, low, high = self.measured
        bound = self.goal.bound
        met = value <= bound if self.goal.at_most else value >= bound
        return ("met" if met else "**MISSED**") + ", within noise" * (low < bound < high)


def ours(records: list[Record]) -> Record | None:
    """The native back-end, named or as `auto` picks it; None if it was not measured."""
    return stored.ours(records, "cpu")


def to_floor(records: list[Record]) -> Spread | None:
    return stored.times(ours(records), stored.base(records))


def extra_mib(records: list[Record]) -> Spread | None:
    extra = stored.extra_bytes(ours(records) or {})
    return Spread.of(None if extra is None else extra / MIB)


def faster_than(peer: str) -> Callable[[list[Record]], Spread | None]:
    """How many times faster we are than the fastest provider whose name starts so."""

    def measure(records: list[Record]) -> Spread | None:
        found = (stored.times(r, ours(records)) for r in _named(records, peer))
        return min(filter(None, found), default=None)

    return measure


def extra_of_eager(records: list[Record]) -> Spread | None:
    """Our memory beyond inputs and gradients over eager's."""
    eager = [stored.extra_bytes(r) for r in _named(records, "eager")]
    least = min((e for e in eager if e is not None), default=None)
    return Spread.of(stored.ratio(stored.extra_bytes(ours(records) or {}), least))


def _named(records: list[Record], prefix: str) -> list[Record]:
    right = (r for r in records if r["status"] == "right")
    return [r for r in right if r["provider"].split(",")[0] == prefix]


def wanted() -> list[Goal]:
    """All goals on the CPU."""
    found = []
    for loss, bound, products in (
        ("bidirectional_kl", 1.12, "its four products"),
        ("jsd", 1.20, "its four products"),
        ("cross_entropy", 1.12, "its three products"),
        ("push_pull", 1.10, "its two projections"),
    ):
        found.append(Goal(f"{NAMES[loss]}: time over {products}", loss, 1024, to_floor, bound))
    for loss, name in NAMES.items():
        for N in (1024, 8192):
            text = f"{name}, N={N}: MiB beyond inputs and gradients"
            found.append(Goal(text, loss, N, extra_mib, 96))
    for loss in ("bidirectional_kl", "jsd"):
        name = NAMES[loss]
        for peer, bound in (("eager", 1.6), ("trl", 2.0)):
            text = f"{name}: times faster than {peer}"
            found.append(Goal(text, loss, 1024, faster_than(peer), bound, at_most=False))
        text = f"{name}: memory beyond inputs and gradients over eager's"
        found.append(Goal(text, loss, 1024, extra_of_eager, 0.1))
    return found


def outcomes(runs: list[Run]) -> list[Outcome]:
    """Set each goal beside the newest CPU run that has its case, whatever came of it there."""
    newest = sorted(
        (run for run in runs if run.device == "cpu"),
        key=lambda run: run.content["started_utc"],
        reverse=True,
    )
    return [_outcome(goal, newest) for goal in wanted()]


def _outcome(goal: Goal, newest: list[Run]) -> Outcome:
    for run, records in _cases(newest, goal):
        one = ours(records)
        if one is not None:
            right = one["status"] == "right"
            return Outcome(goal, run, goal.measure(records) if right else None, one["status"])
    return Outcome(goal)


def _cases(runs: list[Run], goal: Goal) -> list[tuple[Run, list[Record]]]:
    """Cases that a goal speaks of, by run."""
    wanted = {"loss": goal.loss, "N": goal.N, "head": HEAD, "dtype": DTYPE, "mode": "mean"}
    wanted |= {"ignored": 0, "near": True, "trained": goal.loss != "push_pull"}
    return [
        (run, records)
        for run in runs
        for records in stored.groups(run.records, "case")
        if all(records[0].get(key) == value for key, value in wanted.items())
    ]

"""Where others are ahead: the first table of the page.

A peer whose result is right is ahead of what `auto` picks if it is faster in at least 80 % of the
turns, needs less memory by more than 5 %, or has less than half the error. Where turns cannot be
told apart, it is ahead in time if the medians differ by more than the product ceiling drifted. A
peer that computes another loss than the case's counts in time and memory, not in errors. What only
differs in the last digit of an fp32 loss is no difference.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from bench.report import stored
from bench.report.stored import Record, Run, Spread

MEMORY_FACTOR, ERROR_FACTOR = 1.05, 2.0
TURNS = 0.8  # share of them that is not by chance
LOSS_STEP = 2.0**-23  # the loss is one fp32 number; errors below its last digit are luck
KINDS = (*stored.CASES, "step", "loading")


class Measure(NamedTuple):
    """Something of which less is better."""

    name: str
    value: Callable[[Record], float | None]
    factor: float = ERROR_FACTOR
    """How many times less is ahead; of time the turns decide."""
    any_loss: bool = False
    """Whether it compares with who computes another loss."""


class Lead(NamedTuple):
    """A case and measure in which others are ahead."""

    run: Run
    case: str
    measure: Measure
    ours: Record | None
    """What `auto` picks; None if there is no number of ours."""
    others: list[Record]
    """Those ahead, the best first."""

    @property
    def times(self) -> Spread | None:
        """How many times less the best of them needs."""
        if self.ours is None:
            return None
        if self.measure is TIME:
            return stored.times(self.ours, self.others[0])
        value = self.measure.value
        return Spread.of(stored.ratio(value(self.ours), value(self.others[0])))


def _error(key: str, least: float = 0.0) -> Callable[[Record], float | None]:
    def value(one: Record) -> float | None:
        found = one.get(key)
        return max(found, least) if isinstance(found, (int, float)) else None

    return value


TIME = Measure("time", lambda r: r.get("median_ms"), any_loss=True)
MEASURES = (
    TIME,
    Measure("memory", stored.extra_bytes, MEMORY_FACTOR, any_loss=True),
    Measure("error of the loss", _error("error_loss", LOSS_STEP)),
    Measure("error of dX", _error("error_dx")),
    Measure("error of dW", _error("error_dw")),
    Measure("error of the gradient", _error("error_gradient")),
)


def leads(run: Run) -> Iterator[Lead]:
    """Yield every case and measure of a run in which others are ahead."""
    for records in stored.groups(run.records, *KINDS):
        found = stored.ours(records, run.device)
        for measure in MEASURES:
            ours = found if found is not None and _known(measure, found) else None
            others = [r for r in records if _is_peer(r) and _known(measure, r)]
            if ours is not None:
                others = [r for r in others if _ahead(measure, r, ours, run)]
            if others:
                others.sort(key=lambda r: measure.value(r) or 0.0)
                yield Lead(run, stored.title(records[0]), measure, ours, others)


def compared(runs: Sequence[Run]) -> list[str]:
    """Name the peers that have a time in any case."""
    known = (r for run in runs for r in run.records if r["kind"] in KINDS)
    return list(dict.fromkeys(r["provider"] for r in known if _is_peer(r) and r.get("median_ms")))


def _is_peer(one: Record) -> bool:
    return not stored.is_ours(one) and not stored.is_floor(one)


def _known(measure: Measure, one: Record) -> bool:
    """Whether there is a number, of a result that is right and compares."""
    compares = measure.any_loss or not one.get("computes")
    return one["status"] == "right" and compares and measure.value(one) is not None


def _ahead(measure: Measure, one: Record, ours: Record, run: Run) -> bool:
    factor = measure.factor
    if measure is TIME:
        turns = stored.turns(one, ours)
        if turns:
            return sum(ratio < 1 for ratio in turns) >= TURNS * len(turns)
        factor = 1 + run.drift()
    values = measure.value(one), measure.value(ours)
    return values[0] is not None and values[1] is not None and values[0] * factor < values[1]

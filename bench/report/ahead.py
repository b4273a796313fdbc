"""Where others are ahead: the first table of the page.

A peer that computes the same loss, and computes it rightly, is ahead if it is faster than our best
back-end by more than the ceilings drifted within the run, needs less memory by more than 5 %, or
has less than half the error. What only differs in the last digit of an fp32 loss is no difference.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.report import stored
from bench.report.stored import Record, Run

MEMORY_FACTOR, ERROR_FACTOR = 1.05, 2.0
LOSS_STEP = 2.0**-23  # the loss is one fp32 number; errors below its last digit are luck


class Measure(NamedTuple):
    """Something of which less is better."""

    name: str
    value: Callable[[Record], float | None]
    factor: Callable[[Run], float]
    """How many times less is ahead."""


class Lead(NamedTuple):
    """A case and measure in which others are ahead."""

    run: Run
    case: str
    measure: str
    ours: Record | None
    """Our best back-end; None if there is no number of ours."""
    others: list[Record]
    """Those ahead, the best first."""
    value: Callable[[Record], float | None]

    @property
    def times(self) -> float | None:
        """How many times less the best of them needs."""
        if self.ours is None:
            return None
        return stored.ratio(self.value(self.ours), self.value(self.others[0]))


def _error(key: str, least: float = 0.0) -> Callable[[Record], float | None]:
    def value(one: Record) -> float | None:
        found = one.get(key)
        return max(found, least) if isinstance(found, (int, float)) else None

    return value


MEASURES = (
    Measure("time", lambda r: r.get("median_ms"), lambda run: 1 + run.drift),
    Measure("memory", stored.extra_bytes, lambda run: MEMORY_FACTOR),
    Measure("error of the loss", _error("error_loss", LOSS_STEP), lambda run: ERROR_FACTOR),
    Measure("error of dX", _error("error_dx"), lambda run: ERROR_FACTOR),
    Measure("error of dW", _error("error_dw"), lambda run: ERROR_FACTOR),
    Measure("error of the gradient", _error("error_gradient"), lambda run: ERROR_FACTOR),
)


def leads(run: Run) -> Iterator[Lead]:
    """Yield every case and measure of a run in which others are ahead."""
    for records in stored.groups(run.records, *stored.CASES, "step"):
        right = [r for r in records if r["status"] == "right" and not stored.is_floor(r)]
        same = [r for r in right if r.get("computes", r.get("loss")) == r.get("loss")]
        for measure in MEASURES:
            known = [(v, r) for r in same if (v := measure.value(r)) is not None]
            known.sort(key=lambda pair: pair[0])
            ours = next(((v, r) for v, r in known if stored.is_ours(r)), None)
            others = [(v, r) for v, r in known if not stored.is_ours(r)]
            if ours is not None:
                others = [(v, r) for v, r in others if v * measure.factor(run) < ours[0]]
            if others:
                ahead = [r for _, r in others]
                best = None if ours is None else ours[1]
                name = stored.title(records[0])
                yield Lead(run, name, measure.name, best, ahead, measure.value)

"""Where things go in the plots of the report; the template draws them.

Positions are percentages of the plot's width and height, so that a plot fits any screen while its
text keeps its size. The y axis points down, as in SVG.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

PAIR = ("before", "after")
DECADES = 5
"""Powers of ten below the top of the loss axis. The loss of a student that still equals its teacher
is a rounding error near 1e-12; it lies on the bottom line, lest it flatten all that follows."""


def whisker(interval: Sequence[float] | None) -> tuple[float, float] | None:
    """A confidence interval of a rate, in percent."""
    return None if interval is None else (100 * interval[0], 100 * interval[1])


def depth_bars(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired bars of the prefilling attack, one pair for each depth that both summaries have.

    Args:
        before: summary with ``prefill_leak_rate``, also under ``n`` and ``ci95``.
        after: the same of the other model.

    Returns:
        For each depth its name, the left edge and width of its slot, and two bars with rate (None
        if no probe was left to count), count, whisker and left edge.
    """
    depths = [
        d for d in after["prefill_leak_rate"] if d in before["prefill_leak_rate"] and d != "max"
    ]
    slot = 100 / max(len(depths), 1)
    return [
        {
            "depth": depth,
            "middle": slot * (index + 0.5),
            "width": slot * 0.28,
            "bars": [
                {
                    "name": name,
                    "left": slot * (index + 0.5) - slot * 0.3 * (1 - side),
                    "rate": summary["prefill_leak_rate"][depth],
                    "n": summary["n"]["prefill_leak_rate"][depth],
                    "whisker": whisker(summary["ci95"]["prefill_leak_rate"][depth]),
                }
                for side, (name, summary) in enumerate(zip(PAIR, (before, after), strict=True))
            ],
        }
        for index, depth in enumerate(depths)
    ]


def loss_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Loss of each objective over the steps, on a logarithmic axis.

    Args:
        log: entries with ``step`` and ``loss/<role>``. Values that have no logarithm are left out.

    Returns:
        ``curves`` with name, first and last value, and points; ``y_ticks`` and ``x_ticks`` with
        position and label. None if there is nothing to draw.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith("loss/") and value and value > 0 and math.isfinite(value):
                series.setdefault(key.removeprefix("loss/"), []).append((entry["step"], value))
    if not series:
        return None
    values = [value for points in series.values() for _, value in points]
    steps = [step for points in series.values() for step, _ in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    low = max(low, high - DECADES)
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return 100 * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return min(100.0, 100 * (high - math.log10(value)) / (high - low))

    return {
        "curves": [
            {
                "name": name,
                "first": points[0][1],
                "last": points[-1][1],
                "points": " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in points),
            }
            for name, points in series.items()
        ],
        "y_ticks": [(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)],
        "x_ticks": [(x(step), f"{step:g}") for step in _round_steps(first, last)],
    }


def _round_steps(first: float, last: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``first`` to ``last``."""
    raw = max((last - first) / count, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [step * i for i in range(math.ceil(first / step), math.floor(last / step) + 1)]

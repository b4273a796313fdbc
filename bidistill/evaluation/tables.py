"""Numbers of an evaluation as lines of text for a terminal."""

from collections.abc import Mapping
from typing import Any

from bidistill.evaluation.measures import ARROWS, Measure


def rates_table(summary: dict[str, Any], base: dict[str, Any] | None = None) -> str:
    """Rates of probes, with counts and intervals, and those of a base model beside them."""
    others = {} if base is None else {name: rate for name, rate, *_ in _rates(base)}
    rows = []
    for name, rate, count, interval in _rates(summary):
        if rate is not None:
            low, high = interval
            row = f"{name:26}{rate:7.1%}  n={count:<5}[{low:.1%}, {high:.1%}]"
            other = others.get(name)
            rows.append(row if other is None else f"{row}  base {other:.1%}")
    return "\n".join(rows)


def measures_table(
    measures: Mapping[str, Measure], base: Mapping[str, Measure] | None = None
) -> str:
    """Measures with interval, count, direction and ideal; with a base model, the paired difference.

    The arrow says which way is better: lower, higher, or towards the ideal.
    """
    width = max(map(len, measures), default=0) + 2
    return "\n".join(
        _row(name, measure, width, None if base is None else base[name])
        for name, measure in measures.items()
    )


def _row(name: str, measure: Measure, width: int, base: Measure | None) -> str:
    start = f"  {name:{width}}{ARROWS[measure.meaning.good]} "
    if measure.value is None:
        return f"{start}not measured: {measure.why}"
    interval = _interval(measure.interval())
    row = f"{start}{_number(measure.value)} {interval:20} n={len(measure.ids):<5}"
    if base is not None and base.value is not None:
        apart = measure.difference(base)
        row += f" base {_number(base.value)}  difference {_number(apart['value'], '+')} "
        row += _interval(apart["ci95"])
    return row.rstrip()


def _rates(summary: dict[str, Any]) -> list[tuple[str, float | None, int, Any]]:
    """Name, rate, count and interval of every rate, nested ones too."""
    rates = []
    for key, value in summary.items():
        if key in ("n", "ci95"):
            continue
        n, ci95 = summary["n"][key], summary["ci95"][key]
        if isinstance(value, dict):
            rates += [(f"{key}.{at}", value[at], n[at], ci95[at]) for at in value]
        else:
            rates.append((key, value, n, ci95))
    return rates


def _number(value: float, sign: str = "") -> str:
    """Four digits; small and large ones by their exponent."""
    return f"{value:{sign}8.4g}"


def _interval(ci95: list[float] | None) -> str:
    return "" if ci95 is None else f"[{ci95[0]:.4g}, {ci95[1]:.4g}]"

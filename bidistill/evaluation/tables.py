"""Numbers of an evaluation as lines of text for a terminal."""

from collections.abc import Mapping
from typing import Any


def rates_table(
    summary: dict[str, Any],
    base: dict[str, Any] | None = None,
    difference: Mapping[str, Any] | None = None,
) -> str:
    """Rates of probes, with counts and intervals; and those of another model, and the difference.

    The worst depth has no difference: it may be another depth of the other model.
    """
    others = {} if base is None else {name: rate for name, rate, *_ in _rates(base)}
    rows = []
    for name, rate, count, interval in _rates(summary):
        if rate is None:
            continue
        low, high = interval
        row = f"{name:26}{rate:7.1%}  n={count:<5}[{low:.1%}, {high:.1%}]"
        if name in others:
            row = f"{row:60}base {others[name]:.1%}"
        if apart := (difference or {}).get(name):
            row += f"  difference {apart['value']:+.1%}"
            row += f" [{apart['ci95'][0]:+.1%}, {apart['ci95'][1]:+.1%}]" if apart["ci95"] else ""
        rows.append(row)
    return "\n".join(rows)


def measures_table(
    measures: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    difference: Mapping[str, Any] | None = None,
) -> str:
    """Summaries of measures, one a line; of two models also those of the other and the difference.

    The arrow says which way is better: lower, higher, or towards the ideal.
    """
    width = max(map(len, measures), default=0) + 2
    lines = []
    for name, one in measures.items():
        line = f"  {name:{width}}{one['arrow']} "
        if one["value"] is None:
            lines.append(f"{line}not measured: {one['note']}")
            continue
        line += f"{_number(one['value'])} {_interval(one['ci95']):20} n={one['n']:<5}"
        if base is not None and difference is not None:
            apart = difference[name]
            line += f" base {_number(base[name]['value'])}  difference "
            line += f"{_number(apart['value'], '+')} {_interval(apart['ci95'])}"
        lines.append(line.rstrip())
    return "\n".join(lines)


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

"""The rates of the attacks as a Markdown table, one model or two side by side."""

from collections.abc import Mapping
from typing import Any

SIGNS = ("refusal", "empty", "gibberish")


def table(summary: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> str:
    """Lines of a table with a row for each attack and one for the worst.

    Args:
        summary: of `bidistill.evaluation.attacks.attack`.
        base: the same of the model that it is compared with.
    """
    heads = ["attack", *(["leak before"] if base else []), "leak", "95 % interval", "probes"]
    heads += ["attempts a probe", "left out", *SIGNS]
    rows = [heads, ["---"] * len(heads)]
    for name, rate in summary["attacks"].items():
        before = [_percent(base["attacks"][name]["leak"])] if base else []
        rows.append(
            [
                name,
                *before,
                _percent(rate["leak"]),
                _interval(rate["ci95"]),
                str(rate["n"]),
                str(rate["attempts_per_probe"]),
                str(rate["left_out"]),
                *(_percent(rate[sign]) for sign in SIGNS),
            ]
        )
    worst = summary["worst"]
    before = [f"{_percent(base['worst']['leak'])} ({base['worst']['name']})"] if base else []
    last = [f"worst: {worst['name']}", *before, _percent(worst["leak"]), _interval(worst["ci95"])]
    last.append(str(worst["n"]))
    rows.append(last + [""] * (len(heads) - len(last)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(cells: list[str], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f} %"


def _interval(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"

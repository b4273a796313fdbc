"""Plots of a comparison, as SVG that stands in the page; the same numbers give the same bytes."""

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from bidistill.compare.measures import AXES, FORGET, NEIGHBOR, PREFILL
from bidistill.compare.recipe import Limits
from bidistill.compare.results import Row, within

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#5b6673")
"""Told apart by colour-blind people too (Okabe and Ito, and two more)."""
MARKS = "osD^vPX*<>hd"


def pareto(rows: Sequence[Row], limits: Limits) -> str:
    """Forgetting, the worst of asking and prefilling, against held-out neighbours.

    Bars are 95 % intervals, small dots single seeds; the line joins methods that no other beats
    in both.
    """
    figure, ax = _figure(5.0, 4.6)
    bound = max(limits.forget_leak_rate, limits.prefill_leak_rate)
    ax.axvspan(-0.03, bound, color="#14793a", alpha=0.10, lw=0)
    points = []
    for number, row in enumerate(rows):
        worst = max((FORGET, PREFILL), key=lambda measure: row.value(measure) or 0.0)
        x, y = row.estimates[worst.key], row.estimates[NEIGHBOR.key]
        if x is None or y is None:
            continue
        points.append((x.value, y.value))
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        bars = {
            "xerr": [[max(x.value - x.ci95[0], 0)], [max(x.ci95[1] - x.value, 0)]],
            "yerr": [[max(y.value - y.ci95[0], 0)], [max(y.ci95[1] - y.value, 0)]],
        }
        ax.errorbar(
            x.value,
            y.value,
            **bars,
            **style,
            ms=8,
            elinewidth=0.8,
            alpha=0.9,
            ls="",
            label=row.name,
        )
        if len(x.seeds) > 1:
            ax.scatter(x.seeds, y.seeds, s=9, color=style["color"], alpha=0.6)
    if points:
        front = frontier(points)
        ax.plot(*zip(*front, strict=True), color="#5b6673", lw=1, ls="--", zorder=0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel("still says the fact: asked or under the worst prefill ↓")
    ax.set_ylabel("held-out neighbours known ↑")
    ax.grid(alpha=0.3)
    names = [row.name for row in rows if within(row, limits)]
    reached = ", ".join(names) if names else "none"
    return _svg(figure, f"Leak against held-out neighbours; within the limits: {reached}")


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: none has as small an x and a greater y, or the reverse.

    Example:
        >>> frontier([(0.0, 0.5), (0.1, 0.9), (0.2, 0.7), (1.0, 1.0)])
        [(0.0, 0.5), (0.1, 0.9), (1.0, 1.0)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def radar(row: Row, base: Row, colour: str) -> str:
    """The five axes of a method, 1 outside; the model before is the grey line."""
    figure, ax = _figure(2.7, 2.5, projection="polar")
    names = list(AXES)
    angles = [2 * math.pi * k / len(names) for k in range(len(names))]
    for who, edge, width in ((base, "#8c96a3", 1), (row, colour, 2)):
        values = who.axes(base)
        ring = [values[name] or 0.0 for name in names]
        ax.plot([*angles, angles[0]], [*ring, ring[0]], color=edge, lw=width)
    ax.fill(angles, ring, color=colour, alpha=0.2)
    ax.set_theta_offset(math.pi / 2)
    ax.set_theta_direction(-1)
    ax.set_ylim(0, 1)
    ax.set_yticks([0.25, 0.5, 0.75, 1.0], labels=[])
    ax.set_xticks(angles, labels=[name.replace("-", "-\n") for name in names], fontsize=8)
    shown = ", ".join(
        f"{name} {'not measured' if value is None else f'{value:.2f}'}"
        for name, value in row.axes(base).items()
    )
    return _svg(figure, f"{row.name}: {shown}")


def _figure(width: float, height: float, **axes: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """A figure with one plot, whose text stays text."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "bidistill", "svg.fonttype": "none"})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot(**axes)


def _svg(figure: Any, alt: str) -> str:  # noqa: ANN401
    """The figure as an SVG element with words for those who do not see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # sized by the page, not by the picture
    text = re.sub(r'(<svg [^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)

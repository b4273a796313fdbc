"""The picture of the gradient report: cosines over training, and the mean transfer matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bidistill.files import atomic_path

LINES = (
    ("#d55e00", "o", "-"),
    ("#0072b2", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
    ("#e69f00", "v", "-"),
    ("#56b4e9", "P", "--"),
)
"""Of six pairs: told apart by colour-blind people (Okabe and Ito), and without colour too."""
MAP = "PuOr"
"""Of the heat map: orange to purple, which differ in any kind of colour blindness."""


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Write the picture as SVG; the same numbers give the same bytes.

    Args:
        path: of the picture.
        result: what ``gradients.json`` holds.
    """
    # matplotlib is slow to import
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "bidistill", "font.size": 9}):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        _cosines(left, result)
        _transfer(figure, right, result)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _cosines(ax, result: Mapping[str, Any]) -> None:  # noqa: ANN001 (a lazily imported class)
    """A line for each pair; gaps where a gradient was negligible."""
    points = result["measurements"]
    steps = [point["step"] for point in points]
    for (colour, mark, style), pair in zip(LINES, result["pairs"], strict=False):
        values = [point["cosines"][pair] for point in points]
        shown = [np.nan if value is None else value for value in values]
        ax.plot(steps, shown, color=colour, marker=mark, ls=style, ms=5, lw=1.3, label=pair)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xlabel("updates done")
    ax.set_ylabel("cosine")
    ax.set_title("Cosine of two roles' gradients; below 0 they conflict")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=8)


def _transfer(figure, ax, result: Mapping[str, Any]) -> None:  # noqa: ANN001
    """A cell for each role stepped for and role looked at, with its number."""
    roles = result["roles"]
    means = [[result["transfer"][i][j]["mean"] for j in roles] for i in roles]
    values = np.array([[np.nan if mean is None else mean for mean in row] for row in means])
    image = ax.imshow(values, cmap=MAP + "_r", vmin=-1, vmax=1)
    for (i, j), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}"  # noqa: RUF001
        dark = abs(value) > 0.6
        ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(roles)), roles)
    ax.set_yticks(range(len(roles)), roles)
    ax.set_xlabel("changes the loss of")
    ax.set_ylabel("a small step for")
    ax.set_title("Transfer, mean over training; below 0 it helps")
    figure.colorbar(image, ax=ax, extend="both", shrink=0.8)

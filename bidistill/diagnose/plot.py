"""The picture of the domain report: clouds of hidden states above, the gaps between them below."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from bidistill.data.records import Role
from bidistill.diagnose.gap import MEASURES, Comparison
from bidistill.diagnose.report import FORMS, MEASURE_NAMES
from bidistill.files import atomic_path

COLOURS: dict[Role, str] = {
    "forget": "#d55e00",
    "neighbor": "#0072b2",
    "retain": "#009e73",
    "adversarial": "#cc79a7",
    "gold": "#e69f00",
}
"""Told apart by colour-blind people too (Okabe and Ito)."""
MARKS: dict[Role, str] = {
    "forget": "o",
    "neighbor": "s",
    "retain": "^",
    "adversarial": "D",
    "gold": "v",
}
FORM_MARKS = {"before": "o", "chat": "s", "after": "D"}
FORM_COLOURS = {"before": "#8c8c8c", "chat": "#e69f00", "after": "#1f4e79"}

States = Mapping[str, Mapping[Role, Float64[np.ndarray, "n H"]]]
"""By form and role."""


def draw(path: Path, states: States, comparisons: Mapping[str, Comparison]) -> None:
    """Write the picture as SVG; the same numbers give the same bytes."""
    # matplotlib is slow to import, and a report without a model has no picture
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "bidistill", "font.size": 9}):
        figure = Figure(figsize=(12, 8), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 0.9), squeeze=False)[:, 0]
        _clouds(upper, states)
        _gaps(lower, comparisons)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _clouds(figure, states: States) -> None:  # noqa: ANN001 (a lazily imported class)
    """For each form its two main directions."""
    forms = [form for form in FORMS if form in states]
    axes = figure.subplots(1, len(forms), squeeze=False)[0]
    for ax, form in zip(axes, forms, strict=True):
        roles = states[form]
        points, share = _plane(np.concatenate(list(roles.values())))
        start = 0
        for role, rows in roles.items():
            part = points[start : start + len(rows)]
            start += len(rows)
            ax.scatter(
                *part.T, s=14, alpha=0.6, color=COLOURS[role], marker=MARKS[role], label=role, lw=0
            )
        ax.set_title(f"{FORMS[form]} ({share:.0%} of the variance shown)")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.legend(loc="best", fontsize=8)
    figure.suptitle("Hidden states at the read-out position: first two principal directions")


def _plane(points: Float64[np.ndarray, "n H"]) -> tuple[Float64[np.ndarray, "n 2"], float]:
    """Coordinates in the plane of most variance, and its share of it."""
    _, sizes, directions = np.linalg.svd(points - points.mean(0), full_matrices=False)
    total = (sizes**2).sum()
    share = float((sizes[:2] ** 2).sum() / total) if total > 0 else 1.0
    return (points - points.mean(0)) @ directions[:2].T, share


def _gaps(figure, comparisons: Mapping[str, Comparison]) -> None:  # noqa: ANN001
    """For each measure the gap of every pair, form by form, with its interval."""
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    pairs = list(comparisons)
    forms = [form for form in FORMS if any(form in c.gaps for c in comparisons.values())]
    for ax, measure in zip(axes, MEASURES, strict=True):
        for shift, form in enumerate(forms):
            heights = [-i - 0.2 * (shift - (len(forms) - 1) / 2) for i in range(len(pairs))]
            shown = [(h, c.gaps[form]) for h, c in zip(heights, comparisons.values(), strict=True)
                     if form in c.gaps]  # fmt: skip
            estimates = [getattr(gap, measure) for _, gap in shown]
            # a percentile interval need not hold the estimate, and bars have no negative length
            bars = [[max(e.value - e.low, 0) for e in estimates],
                    [max(e.high - e.value, 0) for e in estimates]]  # fmt: skip
            ax.errorbar(
                [e.value for e in estimates], [height for height, _ in shown], xerr=bars,
                fmt=FORM_MARKS[form], color=FORM_COLOURS[form], capsize=3, ms=5, label=FORMS[form],
            )  # fmt: skip
        ax.axvline(0, color="black", lw=0.6)
        ax.set_title(MEASURE_NAMES[measure])
        ax.set_yticks([-i for i in range(len(pairs))], pairs)
        ax.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="best", fontsize=8)
    figure.suptitle("Gap between roles, 95 % intervals; 0: no difference")

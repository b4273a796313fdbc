"""The gradient report in words: how many pairs point apart, and tables for people."""

from collections.abc import Mapping
from typing import Any

from bidistill.markdown import table

NOTES = """\
**How to read it.** The gradients are those of the roles' losses as they enter the loss of a step:
weighted, over the step's own examples, by all parameters that train, without dropout. A *cosine*
below 0 means that the step which helps one role most hurts the other, to first order. The
*transfer* is what really happens: the parameters make a small step along minus the gradient of the
role on the left, and each role's loss is looked at. Its change is divided by the length of the step
and the norm of that role's own gradient, so it has no unit: below 0 the role is helped, above 0 it
is hurt, and without curvature it is minus the cosine (-1 for the role itself). What it has beyond
that comes from curvature. The step is so short that the role's own loss falls by what its gradient
promises, to a tenth. A role whose gradient is negligible beside the largest one has no direction
and is left out; a role whose teacher is the model itself begins like that.
Measurements of one run depend on each other, so the shares carry no interval: they describe this
run, and another seed, recipe or model may differ."""


def sentence(overall: Mapping[str, Any]) -> str:
    """The share of negative cosines with its count, in words.

    Args:
        overall: ``measured`` and ``negative`` cosines, and their ``share``.

    Example:
        >>> sentence({"measured": 5, "negative": 2, "share": 0.4})
        'Of 5 cosines of two gradients each, 2 are negative (40 %).'
    """
    if not overall["measured"]:
        return "Nothing to compare: never were two gradients more than negligible."
    return (
        f"Of {overall['measured']} cosines of two gradients each, {overall['negative']} are "
        f"negative ({100 * overall['share']:.0f} %)."
    )


def markdown(result: Mapping[str, Any], plot: str) -> str:
    """The whole report.

    Args:
        result: what ``gradients.json`` holds.
        plot: name of the picture beside the report.
    """
    recipe = result["recipe"]
    lines = [
        "# Gradient report",
        "",
        f"Model: {recipe['model']['path']}; data: {recipe['data']['train']}; combined by "
        f"{recipe['combine']}; seed {recipe['seed']}. {len(result['measurements'])} measurements "
        f"in {result['steps']} of {recipe['steps']} steps.",
        "",
        f"**{sentence(result['overall'])}**",
        "",
        f"![{alt_text(result)}]({plot})",
        "",
        "## Cosines of gradients",
        "",
        table(
            ["roles", "measured", "negative", "share", "mean", "lowest", "highest"],
            [_pair_row(name, pair) for name, pair in result["pairs"].items()],
        ),
        "",
        "## Transfer: mean change, and its range",
        "",
        _transfer_table(result["transfer"]),
        "",
        NOTES,
    ]
    return "\n".join(lines) + "\n"


def alt_text(result: Mapping[str, Any]) -> str:
    """What the picture shows, for those who cannot see it."""
    cosines = "; ".join(
        f"{name} from {_shown(pair['low'])} to {_shown(pair['high'])}"
        for name, pair in result["pairs"].items()
        if pair["measured"]
    )
    moves = "; ".join(
        f"a step for {one} changes "
        + ", ".join(f"{other} by {_shown(cell['mean'])}" for other, cell in row.items())
        for one, row in result["transfer"].items()
    )
    return (
        f"Left, the cosines of the roles' gradients over training: {cosines or 'none measured'}. "
        f"Right, the mean transfer matrix as a heat map: {moves}."
    )


def _pair_row(name: str, pair: Mapping[str, Any]) -> list[str]:
    share = "" if pair["share"] is None else f"{100 * pair['share']:.0f} %"
    numbers = [_shown(pair[key]) for key in ("mean", "low", "high")]
    return [name, str(pair["measured"]), str(pair["negative"]), share, *numbers]


def _transfer_table(transfer: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row for each role that a step was taken for."""
    rows = []
    for one, row in transfer.items():
        cells = [
            f"{_shown(c['mean'])} [{_shown(c['low'])}, {_shown(c['high'])}], n = {c['measured']}"
            if c["measured"]
            else "not measured"
            for c in row.values()
        ]
        rows.append([one, *cells])
    return table(["a step for", *(f"changes {role}" for role in transfer)], rows)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"

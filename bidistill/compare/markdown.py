"""The table of a comparison as Markdown."""

from collections.abc import Mapping, Sequence

from bidistill import markdown
from bidistill.compare.estimate import Estimate
from bidistill.compare.measures import AXES, MEASURES, Measure
from bidistill.compare.recipe import CompareConfig
from bidistill.compare.results import Row, Verdict, made_with
from bidistill.evaluation.pages import NBSP

NOTHING = "\N{EN DASH}"
"""Where there is no number."""
ARROWS = {"low": "↓", "high": "↑"}


def table(
    config: CompareConfig, rows: Sequence[Row], judged: Verdict, missing: Sequence[str]
) -> str:
    """All of the comparison in words and numbers.

    Args:
        config: what was compared.
        rows: the base model first.
        judged: what the table says.
        missing: names of cells that are not done.
    """
    facts = made_with(rows)
    seeds = ", ".join(map(str, config.seeds))
    shown = [m for m in MEASURES if any(row.estimates[m.key] is not None for row in rows)]
    parts = [
        "# Methods compared",
        judged.sentence,
        f"Commit {facts['commit']}, seeds {seeds}; PyTorch {facts['torch']}, threads "
        f"{facts['threads']}.",
    ]
    if missing:
        parts.append(f"**Not complete**: {', '.join(missing)}.")
    parts += [
        "## Rates",
        "Means over seeds; in brackets 95 % intervals by a bootstrap over items (Wilson's for one "
        "seed where all items agree). n: items. ↓ lower is better, ↑ higher is better.",
        _rates(rows, shown),
        *_seeds([row for row in rows if len(row.cells) > 1], shown),
        "## Five axes",
        "1 is best; what is to be kept as a share of the model before; robustness is the worst of "
        "prefilling and attacks.",
        _axes(rows),
        "## Cost of a cell",
        "Means over seeds. Peak: resident set of the whole process.",
        _costs(rows),
    ]
    if names := attack_names(rows):
        parts += [
            "## Attacks",
            "Share of what was to be forgotten that an attack brings out, by any of its attempts.",
            markdown.table(
                ["method", *names],
                [[row.name, *(text_of(row.attacks.get(name)) for name in names)] for row in rows],
            ),
        ]
    if angles := _gradients(rows):
        parts += [
            "## Gradients of the roles",
            "Mean cosines over training, first seed, and the share of all cosines below zero.",
            angles,
        ]
    notes = [f"- **{row.name}**: {row.note}" for row in rows if row.note]
    if notes:
        parts += ["## Notes", "\n".join(notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def attack_names(rows: Sequence[Row]) -> list[str]:
    """All attacks that were made, in their order."""
    return list(dict.fromkeys(name for row in rows for name in row.attacks))


def text_of(found: Estimate | None) -> str:
    """A rate with its interval.

    Example:
        >>> text_of(Estimate(0.5, (0.5,), 12, (0.25, 0.75)))
        '0.50 [0.25, 0.75]'
    """
    if found is None:
        return NOTHING
    return f"{found.value:.2f} [{found.ci95[0]:.2f}, {found.ci95[1]:.2f}]"


def heading(measure: Measure, rows: Sequence[Row]) -> str:
    """A measure's title with the direction that is good and the items counted.

    Where the worst of several columns counts, it may have fewer items for one row than for another.
    """
    counts = [found.count for row in rows if (found := row.estimates[measure.key]) is not None]
    n = " to ".join(map(str, sorted({min(counts), max(counts)})))
    note = f"{ARROWS[measure.good]} (n = {n})".replace(" ", NBSP)
    return f"{measure.title} {note}"


def _rates(rows: Sequence[Row], shown: Sequence[Measure]) -> str:
    head = ["method", *(heading(measure, rows) for measure in shown)]
    body = [[row.name, *(text_of(row.estimates[m.key]) for m in shown)] for row in rows]
    return markdown.table(head, body)


def _seeds(rows: Sequence[Row], shown: Sequence[Measure]) -> list[str]:
    """The rates of each seed under a heading; nothing where no row has several."""
    if not rows:
        return []

    def seeds(found: Estimate | None) -> str:
        return NOTHING if found is None else " · ".join(f"{value:.2f}" for value in found.seeds)

    head = ["method", *(measure.title for measure in shown)]
    body = [[r.name, *(seeds(r.estimates[m.key]) for m in shown)] for r in rows]
    return ["## Each seed", markdown.table(head, body)]


def _axes(rows: Sequence[Row]) -> str:
    body = []
    for row in rows:
        values = row.axes(rows[0]).values()
        body.append([row.name, *(NOTHING if v is None else f"{v:.2f}" for v in values)])
    return markdown.table(["method", *AXES], body)


def costs(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the numbers of each row below them."""
    head = ["training, s", "steps", "tokens", "peak, MiB", "questions and attacks, s"]
    body = []
    for row in rows:
        cost = row.cost()
        numbers = (cost.train_seconds, cost.steps, cost.tokens, cost.peak_mib, cost.measure_seconds)
        body.append([NOTHING if n is None else f"{n:,.0f}" for n in numbers])
    return head, body


def _costs(rows: Sequence[Row]) -> str:
    head, body = costs(rows)
    named = [[row.name, *numbers] for row, numbers in zip(rows, body, strict=True)]
    return markdown.table(["method", *head], named)


def _gradients(rows: Sequence[Row]) -> str:
    """Mean cosine of each pair of roles; empty if nobody measured any."""
    found = {row.name: angles for row in rows if (angles := row.cells[0].metrics["gradients"])}
    pairs = list(dict.fromkeys(pair for angles in found.values() for pair in angles["pairs"]))

    def number(entry: Mapping[str, float | None] | None, key: str) -> str:
        value = entry and entry[key]
        return NOTHING if value is None else f"{value:+.2f}"

    body = []
    for name, angles in found.items():
        means = [number(angles["pairs"].get(pair), "mean") for pair in pairs]
        body.append([name, *means, number(angles["overall"], "share").lstrip("+")])
    return markdown.table(["method", *pairs, "below zero"], body) if body else ""

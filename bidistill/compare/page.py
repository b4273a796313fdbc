"""What a comparison leaves: a page, a table in Markdown, and all numbers as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bidistill.compare.estimate import Estimate
from bidistill.compare.markdown import NOTHING, attack_names, costs, heading, table
from bidistill.compare.measures import MEASURES
from bidistill.compare.plots import COLOURS, pareto, radar
from bidistill.compare.recipe import CompareConfig
from bidistill.compare.results import (
    Row,
    Verdict,
    made_with,
    replies_by_question,
    verdict,
    within,
)
from bidistill.evaluation.pages import html_page, tagged
from bidistill.evaluation.report import GROUP_TITLES
from bidistill.files import write_json, write_text

PAGE, TABLE, NUMBERS = "compare.html", "compare.md", "compare.json"
SAMPLES = 24
"""Questions of a group that the page shows, at most; all are in the cells."""


def write(config: CompareConfig, rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """Write page, table and numbers into the folder of a comparison.

    Args:
        config: what was compared.
        rows: the base model first.
        missing: names of cells that are not done.

    Returns:
        The table.
    """
    judged = verdict(rows, config.ours, config.limits)
    text = table(config, rows, judged, missing)
    write_text(config.output / TABLE, text)
    write_json(config.output / NUMBERS, _numbers(rows, judged))
    write_text(config.output / PAGE, _page(config, rows, judged, missing))
    return text


def _numbers(rows: Sequence[Row], judged: Verdict) -> dict[str, Any]:
    """Everything that the tables say, unrounded."""
    methods = {
        row.name: {
            "rates": {key: found and asdict(found) for key, found in row.estimates.items()},
            "attacks": {key: found and asdict(found) for key, found in row.attacks.items()},
            "axes": row.axes(rows[0]),
            "cost": asdict(row.cost()),
            "seeds": [cell.seed for cell in row.cells],
        }
        for row in rows
    }
    return {"verdict": asdict(judged), "made_with": made_with(rows), "methods": methods}


def _page(
    config: CompareConfig, rows: Sequence[Row], judged: Verdict, missing: Sequence[str]
) -> str:
    shown = [m for m in MEASURES if any(row.estimates[m.key] is not None for row in rows)]
    attacks = attack_names(rows)
    cost_headings, cost_rows = costs(rows)
    content = [
        {
            "name": row.name,
            "reached": within(row, config.limits),
            "cells": [_cell(row.estimates[measure.key]) for measure in shown],
            "cost": [{"value": number} for number in cost],
            "attacks": [_cell(row.attacks.get(name)) for name in attacks],
            "radar": radar(row, rows[0], COLOURS[number % len(COLOURS)]),
        }
        for number, (row, cost) in enumerate(zip(rows, cost_rows, strict=True))
    ]
    return html_page(
        "compare.html.j2",
        title=f"{len(rows) - 1} methods, {len(config.seeds)} seeds",
        verdict=judged,
        missing=missing,
        headings=[heading(measure, rows) for measure in shown],
        rows=content,
        attacks=attacks,
        cost_headings=cost_headings,
        pareto=pareto(rows, config.limits),
        groups=_groups(rows),
        facts=[
            ("seeds", ", ".join(map(str, config.seeds))),
            *made_with(rows).items(),
        ],
        notes=[(row.name, row.note) for row in rows if row.note],
    )


def _cell(found: Estimate | None) -> dict[str, str]:
    """A rate, its interval and its seeds, in words."""
    if found is None:
        return {"value": NOTHING, "interval": "", "seeds": ""}
    several = len(found.seeds) > 1
    return {
        "value": f"{found.value:.2f}",
        "interval": f"[{found.ci95[0]:.2f}, {found.ci95[1]:.2f}]",
        "seeds": " · ".join(f"{value:.2f}" for value in found.seeds) if several else "",
    }


def _groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sample questions by group, each with what every method says; those that differ first."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUP_TITLES}
    for (group, _, prefill), said in replies_by_question(rows).items():
        first = next(iter(said.values()))
        before = said.get(rows[0].name)
        tags = before and tagged(before)["tags"]
        replies = [
            {"name": name, "changed": tagged(item)["tags"] != tags, **tagged(item)}
            for name, item in said.items()
        ]
        name = group if first["depth"] == 0 else f"{group}/attack"
        groups[name].append({"question": first["question"], "prefill": prefill, "replies": replies})
    found = []
    for name, title in GROUP_TITLES.items():
        questions = groups[name]
        questions.sort(key=lambda q: -sum(said["changed"] for said in q["replies"]))
        if questions:
            found.append(
                {
                    "title": title,
                    "questions": questions[:SAMPLES],
                    "total": len(questions),
                    "open": name == "forget",
                }
            )
    return found

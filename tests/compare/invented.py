"""Cells of an invented comparison: replies are made so that each rate is known."""

import json
from pathlib import Path
from typing import Any

import yaml

from bidistill.compare.cells import Cell, cells_of
from bidistill.compare.recipe import CompareConfig, load_compare
from bidistill.evaluation.probes import write_probes
from tests.evaluation.invented import capital_probe

FORGET, NEIGHBORS, RETAIN = 10, 20, 8

RECIPE = {
    "model": "model",
    "train": {"steps": 3, "data": {"train": "train.jsonl"}},
    "methods": {
        "ours": {"method": "ours"},
        "npo": {"method": "npo", "settings": {"optim.lr": 3e-4}, "note": "a note & more"},
        "told": {"context": [{"role": "user", "content": "Say nothing."}]},
    },
    "seeds": [0, 1],
}


def make(folder: Path, **changes: Any) -> tuple[CompareConfig, list[Cell]]:
    """A recipe, read, with its cells, and the files that it names; all in a folder.

    Tests that make one work in that folder, as a user does: the recipe's paths are relative.
    """
    (folder / "model").mkdir(exist_ok=True)
    for name in ("model/config.json", "model/model.safetensors", "train.jsonl"):
        if not (folder / name).exists():
            (folder / name).write_text(name)
    probes = folder / "probes.jsonl"
    write_probes(probes, [capital_probe("Zembla", "Onhava")])
    raw = RECIPE | {"probes": str(probes), "output": str(folder / "out")} | changes
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    config = load_compare(path)
    return config, cells_of(config, "model", None, probes)


def item(group: str, number: int, *, leak: bool, depth: Any = 0, **more: Any) -> dict[str, Any]:
    """A reply with its marks."""
    return {
        "id": f"{group}/{number}",
        "group": group,
        "depth": depth,
        "question": f"Question {number} of {group}?",
        "prefill": f"It is {depth}" if depth else "",
        "continuation": "<b>Onhava</b>" if leak else "I don't know.",
        "leak": leak,
        "refusal": not leak,
        "empty": False,
        "gibberish": False,
        **more,
    }


def finish(
    cell: Cell, *, leaks: int = 0, prefilled: int = 0, attacked: int = 0, kept: int = NEIGHBORS
) -> None:
    """Write the results of a cell: so many of each kind leak or are known."""
    items = [item("forget", i, leak=i < leaks) for i in range(FORGET)]
    items += [item("forget", i, leak=i < prefilled, depth=2) for i in range(FORGET)]
    items += [item("forget", i, leak=False, depth="opener") for i in range(FORGET)]
    items += [item("neighbor", i, leak=i < kept) for i in range(NEIGHBORS)]
    items += [item("neighbor_train", i, leak=True) for i in range(NEIGHBORS)]
    items += [item("retain", i, leak=i % 2 == 0) for i in range(RETAIN)]
    attacks = [
        item("forget", i, leak=i < attacked, attack="reverse", attempt=a)
        for i in range(FORGET)
        for a in range(2)
    ]
    cell.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("items.jsonl", items), ("attacks.jsonl", attacks)):
        (cell.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = {"seconds": 60.0, "tokens": 1000, "steps": 3, "peak_bytes": [2**30]}
    metrics = {
        "summary": {},
        "attacks": {},
        "gradients": None,
        "cost": None if cell.seed is None else trained,
        "seconds": {"whole": 90.0, "ask": 10.0, "attack": 5.0},
        "peak_bytes": 2**30,
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "threads": 2,
    }
    (cell.folder / "metrics.json").write_text(json.dumps(metrics))

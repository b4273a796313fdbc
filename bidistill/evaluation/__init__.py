"""Measuring what a model says: probes, greedy answers, detectors, rates, and the report."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Heavy modules are imported where they are used: a report is made without a model.


def run(
    model_dir: Path | str,
    adapter: Path | str | None,
    probes_path: Path | str,
    out_dir: Path | str,
) -> dict[str, Any]:
    """Evaluate a local checkpoint on a file of probes.

    Writes ``metrics.json`` (``summary``, and what was measured) and ``items.jsonl`` (every prompt
    with its reply) to ``out_dir``, each as a whole or not at all, and prints the rates.

    Args:
        model_dir: folder of the model and its tokenizer.
        adapter: folder of a LoRA adapter to put on the model, or None.
        probes_path: JSON lines file; see `bidistill.evaluation.probes.Probe`.
        out_dir: folder for the results; created if missing.

    Returns:
        The summary; see `bidistill.evaluation.axes.summarise`.

    Raises:
        UserError: the model, the adapter or the probes cannot be read.
    """
    from bidistill.about import commit, versions
    from bidistill.evaluation.probes import read_probes
    from bidistill.files import write_json
    from bidistill.progress import say

    start = time.monotonic()
    probes = read_probes(probes_path)  # first: a mistake in it shows before the model loads
    model = _load(model_dir, adapter)

    from bidistill.evaluation.axes import evaluate
    from bidistill.loading import load_tokenizer

    summary, items = evaluate(model, load_tokenizer(model_dir), probes, label="answers")
    out_dir = Path(out_dir)
    write_items(out_dir / "items.jsonl", items)
    metrics = {
        "summary": summary,
        "model": str(model_dir),
        "adapter": None if adapter is None else str(adapter),
        "probes": str(probes_path),
        "wall_seconds": round(time.monotonic() - start, 3),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(out_dir / "metrics.json", metrics)
    say(_table(summary))
    return summary


def write_items(path: Path | str, items: Iterable[dict[str, Any]]) -> None:
    """Write items as JSON lines, all or nothing."""
    from bidistill.files import write_text

    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def _load(model_dir: Path | str, adapter: Path | str | None) -> "PreTrainedModel":
    """The model, on the GPU if there is one, with its adapter."""
    import torch

    from bidistill.loading import load_base

    model = load_base(model_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore
    if adapter is None:
        return model
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter: got {adapter}, expected a folder with adapter_model.safetensors; "
            "give the folder that training saved"
        )
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter)  # type: ignore


def _table(summary: dict[str, Any]) -> str:
    """Rates of a summary as lines of text, with counts and intervals."""
    rows = []
    for key, value in summary.items():
        nested = key == "prefill_leak_rate"
        if key in ("n", "ci95"):
            continue
        for depth in value if nested else [None]:
            pick = lambda tree: tree[key][depth] if nested else tree[key]  # noqa: B023, E731
            name = f"{key}.{depth}" if nested else key
            rate, count, interval = (pick(t) for t in (summary, summary["n"], summary["ci95"]))
            if rate is not None:
                low, high = interval
                rows.append(f"{name:26}{rate:7.1%}  n={count:<5}[{low:.1%}, {high:.1%}]")
    return "\n".join(rows)

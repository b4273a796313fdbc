"""Attack a checkpoint from its files, beside the model it came from if asked to."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidistill.about import commit, versions
from bidistill.evaluation import write_items
from bidistill.evaluation.attacks.registry import NAMES, attack, check_names, require_forget
from bidistill.evaluation.attacks.table import table
from bidistill.evaluation.model import load
from bidistill.evaluation.probes import Probe, read_probes
from bidistill.files import file_sha256, require_writable, write_json, write_text
from bidistill.loading import load_tokenizer
from bidistill.progress import say


def run(
    model_dir: Path | str,
    probes_path: Path | str,
    out_dir: Path | str,
    *,
    adapter: Path | str | None = None,
    names: Sequence[str] = (),
    against: Path | str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Attack a local checkpoint and write what came out.

    Writes ``metrics.json`` (``summary``, and what was measured), ``items.jsonl`` (every prompt with
    its reply) and ``attacks.md`` (the table, which is printed, too) to ``out_dir``. With
    ``against`` the same is done to that model: ``metrics.json`` has its summary under ``against``,
    the table a column for it, and ``items_against.jsonl`` its replies.

    Args:
        model_dir: folder of the model and its tokenizer.
        probes_path: JSON lines file; see `bidistill.evaluation.probes.Probe`.
        out_dir: folder for the results; created if missing.
        adapter: folder of a LoRA adapter, merged into the model first: so it would be published,
            and so it is quantised.
        names: of the attacks; all if empty.
        against: folder of a model to compare with, usually the one before it forgot.
        seed: of all draws.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: an attack is unknown; a model, the adapter or the probes cannot be read; or no
            probe is to be forgotten.
    """
    start = time.monotonic()
    chosen = check_names(names or NAMES)
    probes = read_probes(probes_path)  # first: a mistake in it shows before the model loads
    require_forget(probes)
    out_dir = Path(out_dir)
    require_writable(out_dir)
    summary, items = _attack(model_dir, adapter, probes, chosen, seed, "attacks")
    base: dict[str, Any] | None = None
    if against is not None:
        base, base_items = _attack(against, None, probes, chosen, seed, "attacks on the other")
        write_items(out_dir / "items_against.jsonl", base_items)
    write_items(out_dir / "items.jsonl", items)
    metrics = {
        "summary": summary,
        "against": base,
        "model": str(model_dir),
        "adapter": None if adapter is None else str(adapter),
        "against_model": None if against is None else str(against),
        "probes": str(probes_path),
        "probes_sha256": file_sha256(Path(probes_path)),
        "seed": seed,
        "wall_seconds": round(time.monotonic() - start, 3),
        "versions": versions(),
        "commit": commit(),
    }
    write_json(out_dir / "metrics.json", metrics)
    lines = table(summary, base)
    write_text(out_dir / "attacks.md", lines + "\n")
    say(lines)
    return metrics


def _attack(
    model_dir: Path | str,
    adapter: Path | str | None,
    probes: Sequence[Probe],
    names: Sequence[str],
    seed: int,
    label: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load, attack, and let go: only one model is in memory at a time."""
    model = load(model_dir, adapter, merge=True)
    return attack(model, load_tokenizer(model_dir), probes, names, seed=seed, label=label)

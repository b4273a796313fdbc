"""Measuring what a model says: probes, greedy answers, detectors, rates, and the report."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Heavy modules are imported where they are used: a report is made without a model.


def run(
    model_dir: Path | str,
    adapter: Path | str | None,
    probes_path: Path | str | None,
    out_dir: Path | str,
    *,
    data: Sequence[str] = (),
    against: Path | str | None = None,
    reference: Path | str | None = None,
    require: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a local checkpoint on probes, on benchmarks, or both.

    Writes ``metrics.json`` (``summary`` of the probes, ``benchmarks``, and what was measured) and
    ``items.jsonl`` (every item with its reply) to ``out_dir``, each as a whole or not at all, and
    prints the numbers. Started by ``torchrun``, all ranks answer and the first one writes.

    Args:
        model_dir: folder of the model and its tokenizer.
        adapter: folder of a LoRA adapter to put on the model, or None.
        probes_path: JSON lines file, see `bidistill.evaluation.probes.Probe`; or None.
        out_dir: folder for the results; created if missing.
        data: ``PATH`` or ``KIND=PATH`` of benchmarks; see `bidistill.evaluation.benchmarks.kinds`.
        against: folder of another model to evaluate as well, item by item.
        reference: ``items.jsonl`` of a retrained model, evaluated alike.
        require: measures that compare with it and without which nothing is evaluated.
        limit: entries of each file of ``data`` at most.
        seed: of the draw that ``limit`` makes.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: a model, an adapter or a file cannot be read, or what is required cannot be made.
    """
    from bidistill.evaluation.running import Request, evaluate_request

    def path(given: Path | str | None) -> Path | None:
        return None if given is None else Path(given)

    request = Request(
        model=Path(model_dir),
        adapter=path(adapter),
        probes=path(probes_path),
        data=tuple(data),
        against=path(against),
        reference=path(reference),
        require=tuple(require),
        limit=limit,
        seed=seed,
    )
    return evaluate_request(request, Path(out_dir))


def write_items(path: Path | str, items: Iterable[dict[str, Any]]) -> None:
    """Write items as JSON lines, all or nothing."""
    from bidistill.files import write_text

    write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))

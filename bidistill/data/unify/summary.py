"""What a person is told when the data is made."""

from collections.abc import Iterator
from pathlib import Path

from bidistill.data.records import FORGETTING, ROLES
from bidistill.data.unify.manifest import Manifest


def summary(manifest: Manifest, folder: Path) -> str:
    """Return a table of roles and what to know before training."""
    outputs = manifest.outputs
    train, held_out = outputs["train.jsonl"], outputs["held_out.jsonl"]
    lines = [f"{folder}", f"{'role':<12} {'train':>8} {'held out':>9}"]
    for role in ROLES:
        trained, kept = train.roles.get(role, 0), held_out.roles.get(role, 0)
        lines.append(f"{role:<12} {trained:>8} {kept:>9}")
    return "\n".join([*lines, *_remarks(manifest)])


def _remarks(manifest: Manifest) -> Iterator[str]:
    repeats = manifest.steps["deduplicate"]
    if repeats["exact"] or repeats["near"]:
        yield f"repeats dropped: {repeats['exact']} exact, {repeats['near']} near"
    for name, source in manifest.sources.items():
        if source.ungrouped:
            yield f"{name}: {source.ungrouped} of {source.kept} items name no entity looked for"
    if "anchors.csv" in manifest.outputs:
        rows = manifest.outputs["anchors.csv"].records
        yield f"anchors.csv: {rows} anchors to review; see anchors.reviewed"
    for role, count in manifest.outputs["train.jsonl"].without_answer.items():
        key = "forgetting" if role in FORGETTING else "keeping"
        yield (
            f"{role}: {count} records have no answer yet and cannot be trained on; have a model "
            f"write it (model, targets.{key}), or leave them out with targets.unanswered=drop"
        )

"""All steps of ``bidistill unify`` in their order."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import bidistill
from bidistill.data.readers import read_records, write_records
from bidistill.data.records import ROLES, Record, Role
from bidistill.data.sources import read_items
from bidistill.data.unify import anchors, leaks, manifest, output, prefills, targets
from bidistill.data.unify.deduplicate import Dropped, deduplicate
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.manifest import FileEntry, Manifest, OutputEntry
from bidistill.data.unify.near import normalise
from bidistill.data.unify.reading import read
from bidistill.data.unify.recipe import Recipe, as_dict, hash_of
from bidistill.data.unify.split import split
from bidistill.data.unify.writer import Writer
from bidistill.data.unify.writers import make_writer
from bidistill.errors import UserError
from bidistill.files import user_cache

TRAIN, HELD_OUT, GOLD, ANCHORS = "train.jsonl", "held_out.jsonl", "gold.jsonl", "anchors.csv"
EXAMPLES = 20
"""Dropped repeats that the manifest names."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unified:
    """What the steps made of the sources."""

    train: list[Draft]
    held_out: list[Draft]
    rows: list[anchors.AnchorRow]
    """Anchors for a person to review."""
    sources: dict[str, manifest.SourceEntry]
    steps: dict[str, Any]
    """What each step counted."""


def run(recipe: Recipe, *, overwrite: bool = False) -> Manifest:
    """Read the sources, take all steps and write the output folder, whole or not at all.

    Args:
        recipe: what to do.
        overwrite: replace an earlier result that nobody has changed since.

    Returns:
        What was written, as ``manifest.json`` says it.

    Raises:
        UserError: a file cannot be used, a step refuses, a leak was found, or the output folder is
            taken.
    """
    output.require_free(recipe, overwrite)
    writer = make_writer(recipe.model, user_cache() / "replies")
    unified = unify(recipe, writer)
    with output.new_folder(recipe.output) as folder:
        outputs = _write(folder, unified)
        settings = as_dict(recipe)
        result = Manifest(
            bidistill=bidistill.__version__,
            recipe=settings,
            recipe_sha256=hash_of(settings),
            seed=recipe.seed,
            model=None if writer is None else writer.identity,
            sources=unified.sources,
            other_files=_other_files(recipe),
            steps=unified.steps,
            outputs=outputs,
        )
        manifest.write(folder, result)
    return result


def unify(recipe: Recipe, writer: Writer | None) -> Unified:
    """Take all steps, and write nothing.

    Args:
        recipe: what to do.
        writer: the model, if the recipe has one.

    Raises:
        UserError: as `run`.
    """
    recipe = _rooted(recipe)
    readings = {name: read(name, recipe, writer) for name in recipe.sources}
    measured = (item for path in recipe.leaks.against for item in read_items(recipe.root / path))
    against = leaks.evaluated(measured, recipe.choices)
    drafts = [draft for reading in readings.values() for draft in reading.drafts]
    steps: dict[str, Any] = {"read": roles_of(drafts)}
    if text := {name: reading.text for name, reading in readings.items() if reading.text}:
        steps["text"] = text

    drafts, dropped = deduplicate(drafts, recipe.deduplicate, workers=recipe.workers)
    steps["deduplicate"] = _repeats(dropped)
    train, held_out = split(drafts, recipe.split, recipe.seed)
    steps["split"] = {"train": roles_of(train), "held_out": roles_of(held_out)}

    new, rows, steps["anchors"] = _anchors(train, held_out, recipe, writer)
    train, counts = targets.answer([*train, *new], recipe.targets, recipe.seed, writer)
    steps["targets"] = counts
    if recipe.targets.unanswered == "drop" and not train and counts.get("without an answer"):
        raise UserError(
            "targets.unanswered: got drop, which leaves no record to train on, expected one with "
            "an answer; have them answered by targets.forgetting and targets.keeping, or set "
            "targets.unanswered to keep"
        )
    attacks = prefills.adversarial(_of("forget", train), recipe.prefills, recipe.seed)
    steps["prefills"] = {"made": len(attacks)}
    train = [*train, *attacks]
    leaks.check(train, held_out, against, recipe.leaks, workers=recipe.workers)
    steps["leaks"] = {"held_out": len(held_out), "against": len(against)}
    return Unified(
        train=train,
        held_out=held_out,
        rows=rows,
        sources={name: reading.entry for name, reading in readings.items()},
        steps=steps,
    )


def roles_of(entries: Iterable[Draft | Record]) -> dict[Role, int]:
    """How many of each role there are; roles without any are left out."""
    counts = Counter(entry.role for entry in entries)
    return {role: counts[role] for role in ROLES if counts[role]}


def _of(role: Role, drafts: Sequence[Draft]) -> list[Draft]:
    return [draft for draft in drafts if draft.role == role]


def _repeats(dropped: Sequence[Dropped]) -> dict[str, Any]:
    counts = Counter(one.why for one in dropped)
    examples = [dataclasses.asdict(one) for one in dropped[:EXAMPLES]]
    return {"exact": counts["exact"], "near": counts["near"], "examples": examples}


def _anchors(
    train: Sequence[Draft], held_out: Sequence[Draft], recipe: Recipe, writer: Writer | None
) -> tuple[list[Draft], list[anchors.AnchorRow], dict[str, int]]:
    """Anchors that may be trained on, their table, and what became of those that were made."""
    made, rows = anchors.anchors(
        _of("forget", train), _of("neighbor", train), recipe.anchors, recipe.seed, writer
    )
    free = _of_trained_entities(made, train, held_out, recipe)
    # an anchor from the corpus repeats a neighbour on purpose
    meant = {row.id for row in rows if row.by == "corpus"}
    fresh = {draft.id for draft in _new(free, [*held_out, *train], recipe)}
    new = [draft for draft in free if draft.id in meant | fresh]
    if recipe.anchors.reviewed is None:  # a person's table stays whole
        used = {draft.id for draft in free}
        rows = [row for row in rows if row.id in used]
    counts = {"made": len(made), "of held-out entities": len(made) - len(free)}
    return new, rows, {**counts, "repeats": len(free) - len(new)}


def _of_trained_entities(
    made: Sequence[Draft], train: Sequence[Draft], held_out: Sequence[Draft], recipe: Recipe
) -> list[Draft]:
    """Anchors about nobody that the split held out; a draft may be held out for another's sake."""
    trained = {draft.entity for draft in train if draft.role in recipe.split.roles}
    held = {normalise(draft.entity) for draft in held_out if draft.entity not in trained}
    return [draft for draft in made if normalise(draft.entity) not in held]


def _new(made: Sequence[Draft], known: Sequence[Draft], recipe: Recipe) -> list[Draft]:
    """Anchors that ask what nothing else asks, be it trained or held out."""
    exact = dataclasses.replace(recipe.deduplicate, near=None)
    kept = {draft.id for draft in deduplicate([*known, *made], exact)[0]}
    return [draft for draft in made if draft.id in kept]


def _rooted(recipe: Recipe) -> Recipe:
    """The recipe with the files that steps open by themselves where they are from here."""
    replace, root = dataclasses.replace, recipe.root
    anchor, prefill, target = recipe.anchors, recipe.prefills, recipe.targets
    if anchor.reviewed is not None:
        anchor = replace(anchor, reviewed=root / anchor.reviewed)
    if isinstance(anchor.names, Path):
        anchor = replace(anchor, names=root / anchor.names)
    if isinstance(prefill.openers, Path):
        prefill = replace(prefill, openers=root / prefill.openers)
    if isinstance(target.refusals, Path):
        target = replace(target, refusals=root / target.refusals)
    return replace(recipe, anchors=anchor, prefills=prefill, targets=target)


def _write(folder: Path, unified: Unified) -> dict[str, OutputEntry]:
    """Write the files and read them back, as whoever trains on them will."""
    forget = _of("forget", unified.train)
    files = {
        TRAIN: [draft.record() for draft in unified.train],
        HELD_OUT: [_with_gold(draft) for draft in unified.held_out],
        GOLD: [
            dataclasses.replace(_with_gold(draft), role="gold")
            for draft in forget
            if draft.gold is not None
        ],
    }
    entries: dict[str, OutputEntry] = {}
    for name, records in files.items():
        write_records(folder / name, records)
        entries[name] = _entry(folder / name, list(read_records(folder / name)))
    if unified.rows:
        anchors.write_csv(folder / ANCHORS, unified.rows)
        entries[ANCHORS] = _entry(folder / ANCHORS, [], len(unified.rows))
    return entries


def _with_gold(draft: Draft) -> Record:
    """The record to measure with: its answer is the right one."""
    return dataclasses.replace(draft.record(), answer=draft.gold)


def _entry(path: Path, records: Sequence[Record], count: int | None = None) -> OutputEntry:
    size, digest = manifest.must_fingerprint(path)
    return OutputEntry(
        bytes=size,
        sha256=digest,
        records=len(records) if count is None else count,
        roles=roles_of(records),
        without_answer=roles_of(record for record in records if record.answer is None),
    )


def _other_files(recipe: Recipe) -> tuple[FileEntry, ...]:
    """Files that were read beside the sources, each once."""
    names = [source.entity.names_from for source in recipe.sources.values() if source.entity]
    others = (
        recipe.anchors.reviewed,
        recipe.anchors.names,
        recipe.prefills.openers,
        recipe.targets.refusals,
    )
    paths = [
        *recipe.leaks.against,
        *(name for name in names if name is not None),
        *(str(path) for path in others if isinstance(path, Path)),
    ]
    entries = []
    for path in dict.fromkeys(paths):
        size, digest = manifest.must_fingerprint(recipe.root / path)
        entries.append(FileEntry(path=path, bytes=size, sha256=digest))
    for path in prefills.tokenizer_files(recipe.prefills):
        size, digest = manifest.must_fingerprint(path.expanduser())
        entries.append(FileEntry(path=str(path), bytes=size, sha256=digest))
    return tuple(entries)

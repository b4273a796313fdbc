"""The folder of a run: whose it is, and its log.

``run.json`` says what the run is made of; a run is resumed with exactly that, or not at all.
``train_log.jsonl`` has one line per step; ``guard.json`` what a guard measured (see ``guards.py``);
``cost.json`` what the run took (see ``cost.py``).
"""

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bidistill import about, settings
from bidistill.config import TrainConfig, as_dict
from bidistill.cost import COST
from bidistill.errors import UserError
from bidistill.files import atomic_path, remove_temporary, write_json
from bidistill.world import World

RUN = "run.json"
LOG = "train_log.jsonl"
GUARD = "guard.json"
RESULTS = ("adapter", "model", "checkpoints", LOG, COST, GUARD)
"""What a run makes beside RUN; found without it, they are somebody else's."""
FREE = (
    *("parallel", "threads", "async_checkpoints", "keep_checkpoints", "checkpoint_every"),
    *("data.workers", "data.cache", "teacher.cache_folder"),
)
"""Keys that may change on resume: the result stays the same, the first two up to rounding."""


def check(config: TrainConfig, resume: bool) -> None:
    """Refuse an output folder that another run has begun, or this one without ``resume``.

    Raises:
        UserError: the folder holds a run and it is not to be resumed, or it began with another
            configuration; the message names the first key that differs.
    """
    path = config.output / RUN
    if not path.exists():
        if strangers := [name for name in RESULTS if (config.output / name).exists()]:
            raise UserError(
                f"output: got {config.output}, which holds {strangers[0]} but no {RUN}, expected a "
                "new folder; choose another output, or move that away"
            )
        return
    if not resume:
        raise UserError(
            f"output: got {config.output}, which holds a run, expected a new folder; "
            "use --resume to go on with that run, or choose another output"
        )
    # read as a recipe is, so that settings of an earlier version have the form of this one
    before, now = as_dict(settings.check(TrainConfig, _read(path)["config"])), as_dict(config)
    for section in (before, now):
        for key in FREE:
            _drop(section, *key.split("."))
    if changed := _changed_key(before, now):
        key, old, new = changed
        raise UserError(
            f"{key}: got {new}, expected {old} as this run began; undo the change to resume, "
            "or choose another output"
        )


def begin(config: TrainConfig, models: Mapping[str, Mapping[str, str]], world: World) -> None:
    """Write what the run is made of, unless it has begun before; all ranks together.

    What a killed run has left half written is deleted.

    Args:
        config: the recipe.
        models: checksums of the files of the models, by the key of the recipe that names them.
        world: the ranks of the run.

    Raises:
        UserError: the run began with other models, or some rank does not see what the first one
            writes there.
    """
    path = config.output / RUN
    if path.exists():
        _require_models(_read(path).get("models", {}), models)
    world.barrier()  # all have looked
    if world.first:
        if not path.exists():
            versions = {"versions": about.versions(), "commit": about.commit()}
            write_json(path, {"config": as_dict(config), "models": models} | versions)
        for name in (RUN, *RESULTS):
            remove_temporary(config.output / name)
    require_shared(config.output, world)


def _require_models(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> None:
    """Refuse other weights by the name of those that a run began with."""
    for key in before.keys() & now.keys():
        if odd := sorted(dict(before[key].items() ^ now[key].items())):
            raise UserError(
                f"{key}: got another {odd[0]}, expected the one that this run began with; put it "
                "back to resume, or choose another output"
            )


def _read(path: Path) -> dict[str, Any]:
    """What a run is made of.

    Raises:
        UserError: the file is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"config": record["config"], **record}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: got a damaged file, expected what this run began with; choose another output"
        ) from None


def _drop(section: dict[str, Any], key: str, *rest: str) -> None:
    """Take a key, or one within it, out of nested dictionaries."""
    if rest:
        _drop(section[key], *rest)
    else:
        del section[key]


def require_shared(folder: Path, world: World) -> None:
    """Refuse a folder that is not the same one for all ranks.

    Args:
        folder: exists for the first rank.
        world: the ranks of the run; all must call it.
    """
    if world.size == 1:
        return
    # a name that no rank has looked for: a network disk may remember that a file was missing
    probe = folder / world.share(f".shared-{secrets.token_hex(4)}")
    if world.first:
        probe.touch()
    world.barrier()
    missing = world.any(not probe.exists())
    if world.first:
        probe.unlink()
    if missing:
        raise UserError(
            f"output: got {folder}, which not all ranks share, expected one disk for all; "
            "choose another output"
        )


@contextmanager
def log(folder: Path, done: int) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Yield a function that appends one line to the log at once.

    Args:
        folder: of the run.
        done: steps that count. Lines of later ones, left by a killed run, are dropped first.
    """
    path = folder / LOG
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_path(path) as temporary:
            temporary.write_text("".join(lines[:done]), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def write(entry: Mapping[str, object]) -> None:
            file.write(json.dumps({key: _finite(value) for key, value in entry.items()}) + "\n")
            file.flush()

        yield write


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changed_key(old: object, new: object, key: str = "") -> tuple[str, str, str] | None:
    """The first dotted key whose value differs, with both values as JSON."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            inner = f"{key}.{name}" if key else name
            if found := _changed_key(old.get(name), new.get(name), inner):
                return found
        return None
    return None if old == new else (key, json.dumps(old), json.dumps(new))

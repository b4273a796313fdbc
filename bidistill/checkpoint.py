"""Checkpoints of a run: exact resume, safetensors and JSON only, never half written.

A checkpoint is a folder that appears under its final name when it is complete:

.. code-block:: text

    checkpoints/step-000010/
        *.safetensors   weights/<parameter>, fp32
                        optimizer/<parameter>/<exp_avg, exp_avg_sq, step>
                        teacher/<parameter>, what a teacher keeps of it
                        random/<rank>/<device>, states of generators
        state.json      step, loader position, counters

Each rank writes the parts of the tensors that it holds, by PyTorch's distributed checkpoints in
their safetensors form (the other form pickles its index), and reads what it is to hold: another
number of ranks, or another way of sharing out the model, makes no difference.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from bidistill.errors import UserError
from bidistill.files import flush, write_json
from bidistill.world import World

NAME, TEMPORARY = re.compile(r"step-(\d{6,})"), ".step-*.tmp"
STATE = "state.json"
MOMENTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "exp_avg": torch.zeros_like,
    "exp_avg_sq": torch.zeros_like,
    "step": lambda parameter: torch.zeros(()),
}
"""What AdamW keeps of a parameter, and how much room it takes."""


def made(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model's files do not give: what trains, and all of an adapter.

    What a contrastive adapter listens to is frozen, and computed again it might be rounded in
    another way.
    """
    return {n: p for n, p in model.named_parameters() if p.requires_grad or ".lora_" in n}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    teacher: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names in it, as they are: not copies.

    Args:
        model: its parameters that are `made` are saved.
        optimizer: over exactly those that train.
        world: the ranks of the run.
        teacher: tensors of a teacher that changes with the run, by name.
    """
    return {
        **{f"weights/{name}": p.detach() for name, p in made(model).items()},
        **_moments(trainable(model), optimizer),
        **_of_teacher(teacher),
        **{f"random/{world.rank}/{name}": t for name, t in _random_states().items()},
    }


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    world: World,
    protect: int | None = None,
) -> Path:
    """Write a checkpoint and delete all but the latest ``keep``; all ranks together.

    Args:
        folder: where the checkpoints of a run lie.
        tensors: what :func:`tensors` gave, or a copy of it.
        state: what else resuming needs, as JSON; has ``step``, the number of steps done.
        keep: checkpoints that stay, this one included.
        world: the ranks of the run.
        protect: step whose checkpoint stays beside those, however old it is.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: some rank could not write; raised on all of them, and nothing is left behind.
    """
    path = at(folder, state["step"])
    temporary = folder / f".{path.name}.tmp"  # a name that all ranks know
    try:
        with _together(world, path):
            if world.first:
                temporary.mkdir(parents=True)
        with _together(world, path):
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            alone = world.size == 1
            save_tensors(tensors, storage_writer=writer, no_dist=alone, process_group=world.group)
        with _together(world, path):
            if world.first:
                write_json(temporary / STATE, {**state, "files": _sizes(temporary)})
                _publish(temporary, path)
                _prune(folder, keep, protect)
    except UserError:
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def at(folder: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies, if there is one."""
    return folder / f"step-{step:06d}"


def clear(folder: Path) -> None:
    """Delete what a killed run has left half written, or half deleted."""
    for left in folder.glob(TEMPORARY):
        shutil.rmtree(left)


def numbered(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in ``folder`` by their steps, in order; other names are not ours."""
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _publish(temporary: Path, path: Path) -> None:
    """Give a whole checkpoint its name, on the disk before older ones may go.

    One of that name, of a run that went on from before it, is replaced.
    """
    flush(temporary / STATE)
    flush(temporary)
    old = path.rename(temporary.with_name(f".{path.name}.old.tmp")) if path.exists() else None
    temporary.rename(path)
    flush(path.parent)
    if old:
        shutil.rmtree(old)


def _prune(folder: Path, keep: int, protect: int | None) -> None:
    """Delete all but the latest ``keep`` checkpoints and that of the step to ``protect``."""
    for step, old in list(numbered(folder).items())[:-keep]:
        if step != protect:
            shutil.rmtree(old.rename(folder / f".{old.name}.tmp"))  # never half of one by its name


@contextmanager
def _together(world: World, path: Path) -> Iterator[None]:
    """Wait for all ranks at the end of a block; if it fails on one of them, it fails on all."""
    problem = ""
    try:
        yield
    except (Exception, CheckpointException) as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
    if problems := [found for found in world.gather(problem) if found]:
        raise UserError(
            f"{path}: cannot be written ({problems[0]}); make room or mend the disk, then go on "
            "with --resume"
        )


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    return next(reversed(numbered(folder).values()), None)


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World | None = None,
    teacher: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Any]:
    """Put the state of a checkpoint back into model, optimiser, teacher and random generators.

    With as many ranks as it was saved by, sharing the model in the same way, the run goes on bit
    for bit; with others, up to rounding, and generators that a rank lacks stay as seeded.

    Returns:
        The ``state`` that :func:`write` was given.

    Raises:
        UserError: the checkpoint is damaged or holds other parameters than the model trains.
    """
    world = world or World()
    parameters = trainable(model)
    with _readable(path):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if (files := state.pop("files")) != _sizes(path):
            raise ValueError(f"it has other files than the {len(files)} that were written")
        reader = HuggingFaceStorageReader(str(path))
        known = reader.read_metadata().state_dict_metadata
    weights = {f"weights/{name}": p.detach() for name, p in made(model).items()}
    saved = {name for name in known if name.startswith("weights/")}
    if odd := saved ^ weights.keys():
        raise UserError(
            f"{path}: its parameters differ from the model's, for one "
            f"{min(odd).removeprefix('weights/')}; resume with the recipe that began this run"
        )
    moments = {
        f"optimizer/{name}/{key}": make(p.detach())
        for name, p in parameters.items()
        for key, make in MOMENTS.items()
        if f"optimizer/{name}/{key}" in known
    }
    own = f"random/{world.rank}/"
    random = {f"{own}{name}": t for name, t in _random_states().items() if f"{own}{name}" in known}
    with _readable(path), quiet():
        wanted = {**weights, **moments, **_of_teacher(teacher), **random}
        load_tensors(wanted, storage_reader=reader, no_dist=world.size == 1)
    _restore_moments(parameters, optimizer, moments)
    _restore_random_states({name.rpartition("/")[2]: tensor for name, tensor in random.items()})
    return state


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Make one line of whatever is wrong with a checkpoint."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        raise UserError(
            f"{path}: cannot be read ({reason}); delete this folder to resume from the one before"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what PyTorch says of one process that saves alone, and of its own internals.

    Enter it from the main thread: filters of warnings belong to all threads.
    """
    with warnings.catch_warnings():
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.distributed")
        yield


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files with tensors: of one that is missing its tensors would not be missed."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def _of_teacher(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A teacher's tensors under the names of a checkpoint."""
    return {f"teacher/{name}": tensor for name, tensor in tensors.items()}


def _moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimiser's tensors as ``optimizer/<parameter>/<key>``; none before the first update."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_moments(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
) -> None:
    """Hand the tensors back through ``load_state_dict``, which puts them on the right device."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in moments.items():
        name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
        by_name.setdefault(name, {})[key] = value
    order = {parameter: index for index, parameter in enumerate(_all_parameters(optimizer))}
    state = {order[parameters[name]]: entry for name, entry in by_name.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _all_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The optimiser's parameters in the order of its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random_states() -> dict[str, Tensor]:
    """States of torch's generators, one a device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`_random_states`."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

"""The training loop, from a recipe to an exported model.

.. code-block:: text

    output/
        run.json           resolved configuration, versions, commit
        train_log.jsonl    a line per step
        cost.json          time and memory that training took
        checkpoints/       the latest ones (see checkpoint.py)
        guard.json         what the guard measured, if there is one (see guards.py)
        adapter/ or model/ the result

Whatever a step needs is a function of the configuration and the step number, or lies in the
checkpoint: a resumed run ends with the same bits.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from bidistill import checkpoint, circumstances, cost, distributed, export, run_folder
from bidistill.checkpoint_writer import Writer
from bidistill.config import TrainConfig
from bidistill.data.loader import RoleLoader
from bidistill.guards import Guard
from bidistill.loading import empty_model
from bidistill.objectives import Objectives
from bidistill.prepare import Ready, checksums, prepare
from bidistill.progress import say, track
from bidistill.teacher.kinds import Teacher
from bidistill.update import make_optimizer, train_step
from bidistill.world import World, join

CHECKPOINTS = "checkpoints"
STOPPED = 130
"""Exit code after Ctrl-C, by the shell's custom."""


def main(config: TrainConfig, resume: bool = False) -> Path:
    """Train by a recipe and export the result; under ``torchrun``, on all ranks together.

    Args:
        config: the recipe.
        resume: go on from the last checkpoint in ``config.output``; from the start if it has none.

    Returns:
        The exported folder: ``output/adapter``, or ``output/model`` if all weights trained.

    Raises:
        UserError: something in the recipe or the files it names cannot be used, the output folder
            holds another run, it is to be resumed with another configuration, or the guard found
            nothing that may be exported.
        SystemExit: the run was interrupted (code 130), after a checkpoint.
    """
    result = config.output / ("model" if config.model.adapter is None else "adapter")
    world = join()
    run_folder.check(config, resume)
    if resume and result.exists():
        say(f"{result}: finished already")
        return result
    ready = prepare(config, world)
    world.barrier()  # all have looked at the output folder, and nobody has written
    models = world.share(checksums(config) if world.first else None)
    run_folder.begin(config, models, world)  # nothing was written so far, and little can fail now
    if resume and checkpoint.latest(config.output / CHECKPOINTS) is None:
        say(f"{config.output}: no checkpoint to resume from; training from the first step")
    done = train(
        config, ready.model, ready.loader, ready.objectives, ready.teacher, world, ready.guard
    )
    cost.write(config.output, done.step, done.seconds, done.tokens, world)
    _export(config, ready, result, world)
    say(f"wrote {result}")
    return result


def _export(config: TrainConfig, ready: Ready, result: Path, world: World) -> None:
    """Write what was trained; of a model that is shared out, the first rank gathers that alone."""
    model = ready.model
    if world.size > 1:
        made: dict[str, torch.Tensor] = {}
        for name, parameter in checkpoint.made(model).items():
            tensor = distributed.whole(parameter.detach())
            if world.first:
                made[name] = tensor.cpu()
        if world.first:  # what is not made is not written either, so it needs no memory
            model = empty_model(config.model)
            stored = ready.model.state_dict()
            made |= {name: b for name, b in ready.model.named_buffers() if name in stored}
            model.load_state_dict(made, strict=False, assign=True)
            if not isinstance(model, PeftModel):  # beside an adapter no tied weight is made
                model.tie_weights()
    if world.first and isinstance(model, PeftModel):
        export.weaken(model, config.model.adapter.strength)  # type: ignore
        export.save_adapter(model, result)
    elif world.first:
        export.save_merged(model, ready.tokenizer, result)
    world.barrier()


@dataclass
class Progress:
    """How far a run is; with the loader's state, all that is neither weights nor optimiser."""

    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    tokens: int = 0
    """That the student read, on all ranks."""
    seconds: float = 0.0
    """That these steps took."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Progress":
        """As a checkpoint has it; one from before a field was there lacks it."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})


def train(
    config: TrainConfig,
    model: nn.Module,
    loader: RoleLoader,
    objectives: Objectives,
    teacher: Teacher,
    world: World | None = None,
    guard: Guard | None = None,
) -> Progress:
    """Run the remaining steps, from the latest checkpoint if there is one.

    The model then has the weights of the last step, or of the last one that the guard lets pass.

    Args:
        config: the recipe.
        model: with ``distill_step`` attached.
        loader: gives the batches.
        objectives: the losses.
        teacher: gives the rows that the losses compare with.
        world: the ranks that train together; None: this process alone.
        guard: ends the run early; None: nobody does.

    Returns:
        How far the run came, over all of its starts.

    Raises:
        UserError: a checkpoint cannot be read, or the guard lets no step pass.
        SystemExit: interrupted; the checkpoint of the last whole step is written.
    """
    world, guard = world or World(), guard or Guard()
    parameters = list(checkpoint.trainable(model).values())
    optimizer = make_optimizer(parameters, config.optim)
    folder = config.output / CHECKPOINTS
    done, here = Progress(), circumstances.now(config.parallel, world)
    if (path := checkpoint.latest(folder)) is not None:
        state = checkpoint.load(path, model, optimizer, world, teacher.tensors())
        done = Progress.of(state)
        loader.load_state(state["loader"])
        guard.load_state(state.get("guard", []))
        say(f"resuming after step {done.step}")
        circumstances.tell_changes(state.get("circumstances"), here)
    start = time.perf_counter() - done.seconds
    model.train()
    batches = islice(loader, config.steps - done.step)
    log = run_folder.log(config.output, done.step) if world.first else nullcontext(lambda _: None)
    writer = Writer(folder, config.keep_checkpoints, world, background=config.async_checkpoints)
    with writer, log as write, _interrupt() as interrupted:
        for batch, loader_state in track(batches, config.steps - done.step, "train"):
            entry = train_step(
                config, model, optimizer, objectives, teacher, batch, done.step, world
            )
            done.step += 1
            done.skipped += entry["skipped"]
            done.tokens += entry["tokens"]
            write(entry | guard.after_step(done.step))
            done.seconds = time.perf_counter() - start
            if guard.exceeded:
                break
            stop = world.any(interrupted())
            if stop or done.step % config.checkpoint_every == 0 or done.step == guard.best:
                state = {
                    **asdict(done),
                    "loader": loader_state,
                    "guard": guard.state(),
                    "circumstances": here,
                }
                writer.save(model, optimizer, state, teacher.tensors(), protect=guard.best)
            if stop:
                writer.finish()
                say(f"stopped after step {done.step} of {config.steps}; go on with --resume")
                raise SystemExit(STOPPED)
    model.eval()
    if done.skipped:
        say(f"{done.skipped} of {done.step} steps were skipped: loss or gradient not finite")
    if (best := guard.conclude(done.step)) != done.step:
        checkpoint.load(checkpoint.at(folder, best), model, optimizer, world, teacher.tensors())
    return done


@contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; the step at hand is finished first, a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may set handlers
        return
    received: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

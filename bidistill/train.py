"""The training loop, from a recipe to an exported model.

.. code-block:: text

    output/
        run.json           resolved configuration, versions, commit
        train_log.jsonl    a line per step
        checkpoints/       the latest ones (see checkpoint.py)
        adapter/ or model/ the result

The loss of a step is a sum over answer rows divided by their number in the step, over all ranks and
parts, so it does not depend on how the step is cut up. Whatever a step needs is a function of the
configuration and the step number, or lies in the checkpoint: a resumed run ends with the same bits.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill import checkpoint, combine, contrastive, distributed, export, run_folder
from bidistill.attention import use_packed_attention
from bidistill.config import OptimConfig, TrainConfig, require_objectives
from bidistill.data.build import build_store
from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.packing import Packed
from bidistill.data.records import ROLES, Role
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.models import (
    attach_distill_step,
    autocast,
    load_model,
    load_tokenizer,
    read_logit_transform,
)
from bidistill.objectives import Objectives, StepLoss, StepResult
from bidistill.progress import say, track
from bidistill.teacher import HiddenCache, TeacherCache, contexts_of
from bidistill.teacher_cache import rows_on_disk
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
            holds another run, or it is to be resumed with another configuration.
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
    if world.first:
        run_folder.begin(config)  # nothing was written so far, and little can fail from here on
    train(config, ready.model, ready.loader, ready.objectives, ready.cache, world)
    _export(config, ready, result, world)
    say(f"wrote {result}")
    return result


class Ready(NamedTuple):
    """What a recipe is made into before the first step."""

    model: PreTrainedModel | PeftModel
    """With its root methods attached, and shared out among the ranks."""
    tokenizer: PreTrainedTokenizerBase
    loader: RoleLoader
    objectives: Objectives
    cache: TeacherCache | None


def prepare(config: TrainConfig, world: World) -> Ready:
    """Load and build all that training needs; nothing is written to the output folder.

    Args:
        config: the recipe.
        world: the ranks that train together; all must call it.

    Raises:
        UserError: something in the recipe or the files it names cannot be used.
    """
    _check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model.path)
    data, parallel = config.data, config.parallel
    with world.first_before_others():  # who finds the store and who makes it
        examples = build_store(
            data.train,
            tokenizer,
            contexts_of(config.teacher),
            max_answer_tokens=data.max_answer_tokens,
            folder=data.cache,
            workers=data.workers,
        )
    loader = RoleLoader(
        examples,
        data.per_step,
        config.seed,
        rank=world.rank,
        world_size=world.size,
        parts=parallel.accumulate,
        bucket=data.bucket,
    )
    model = load_model(config.model, config.seed)
    apart = () if config.combine == "sum" else sampled(config)
    objectives = Objectives(config.objectives, read_logit_transform(model), apart)
    attach_distill_step(model)
    adapter = config.model.adapter
    cache: TeacherCache | None = None
    with autocast(config.model, model):
        if adapter and adapter.contrast:
            contrastive.initialise(model, _used(examples, config), adapter)
            # each rank has rounded by itself
            world.broadcast(p.data for p in checkpoint.made(model).values())
        if objectives.need_teacher and config.teacher.cache == "disk":
            # by the whole model: ranks fill files of their own
            cache = rows_on_disk(config, model, examples)
        distributed.shard(model, parallel, world, getattr(torch, config.model.dtype))
        if world.rank:
            torch.manual_seed(config.seed + world.rank)  # dropout of its own
        if objectives.need_teacher and config.teacher.cache == "memory":
            cache = HiddenCache(model, _used(examples, config))
    return Ready(model, tokenizer, loader, objectives, cache)


def _export(config: TrainConfig, ready: Ready, result: Path, world: World) -> None:
    """Write what was trained; where the model is shared out, by way of one that is loaded anew."""
    model = ready.model
    if world.size > 1:
        made: dict[str, torch.Tensor] = {}
        for name, parameter in checkpoint.made(model).items():
            tensor = distributed.whole(parameter.detach())
            if world.first:
                made[name] = tensor.cpu()
        if world.first:
            model = load_model(config.model, config.seed)
            model.load_state_dict(made, strict=False)
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


def train(
    config: TrainConfig,
    model: nn.Module,
    loader: RoleLoader,
    objectives: Objectives,
    cache: TeacherCache | None,
    world: World | None = None,
) -> None:
    """Run the remaining steps, from the latest checkpoint if there is one.

    Args:
        config: the recipe.
        model: with ``distill_step`` attached.
        loader: gives the batches.
        objectives: the losses.
        cache: the teacher's rows; None computes them in each step.
        world: the ranks that train together; None: this process alone.

    Raises:
        SystemExit: interrupted; the checkpoint of the last whole step is written.
    """
    world = world or World()
    parameters = list(checkpoint.trainable(model).values())
    optimizer = make_optimizer(parameters, config.optim)
    folder = config.output / CHECKPOINTS
    done = Progress()
    if (path := checkpoint.latest(folder)) is not None:
        state = checkpoint.load(path, model, optimizer, world)
        done = Progress(state["step"], state["skipped"])
        loader.load_state(state["loader"])
        say(f"resuming after step {done.step}")
    model.train()
    batches = islice(loader, config.steps - done.step)
    log = run_folder.log(config.output, done.step) if world.first else nullcontext(lambda _: None)
    with log as write, _interrupt() as interrupted:
        for batch, loader_state in track(batches, config.steps - done.step, "train"):
            entry = train_step(config, model, optimizer, objectives, cache, batch, done.step, world)
            done.step += 1
            done.skipped += entry["skipped"]
            write(entry)
            stop = world.any(interrupted())
            if stop or done.step % config.checkpoint_every == 0:
                state = {"step": done.step, "skipped": done.skipped, "loader": loader_state}
                checkpoint.save(folder, model, optimizer, state, config.keep_checkpoints, world)
            if stop:
                say(f"stopped after step {done.step} of {config.steps}; go on with --resume")
                raise SystemExit(STOPPED)
    model.eval()
    if done.skipped:
        say(f"{done.skipped} of {config.steps} steps were skipped: loss or gradient not finite")


def train_step(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objectives: Objectives,
    cache: TeacherCache | None,
    batch: Batch,
    step: int,
    world: World | None = None,
) -> dict[str, Any]:
    """One update, by all ranks together.

    Args:
        config: the recipe.
        model: with ``distill_step`` attached.
        optimizer: over the trainable parameters.
        objectives: the losses.
        cache: the teacher's rows, or None.
        batch: this rank's examples of the step.
        step: number of the step, from 0.
        world: the ranks that share the step; None: this process alone.

    Returns:
        The line of the log, the same on all ranks but for step_ms: step (from 1), loss and loss per
        role in nats per row, the cosine of each pair of roles' gradients if the combiner needs
        them, grad_norm before clipping, lr, tokens of the student's packs, rows, skipped, step_ms.
    """
    start = time.perf_counter()
    world = world or World()
    lr = learning_rate(config.optim, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = [Part(part, objectives) for part in batch.parts]
    sizes = [[part.student.input_ids.numel(), *part.loss.role_counts] for part in parts]
    tokens, *counts = world.sum([sum(column) for column in zip(*sizes, strict=True)]).tolist()
    results: list[StepResult] = []

    def run_parts() -> Iterator[StepResult]:
        for part in parts:
            part.loss.divisor = int(sum(counts))
            # gradients of single roles are needed at once; and where they are shared out, to keep
            # them whole until the last part would take what sharing saves
            delay = config.combine == "sum" and config.parallel.shard == 1
            distributed.reduce_gradients(model, after=part is parts[-1] or not delay)
            # blocks that are run again in the backward need their attention there, too
            with use_packed_attention(model) if config.parallel.recompute else nullcontext():
                results.append(forward(config, model, objectives, cache, part))
                yield results[-1]

    optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # gradients of the ranks are averaged, and the loss is a sum over all of them
    seed = f"{config.seed}/{step}"
    cosines = combine.backward(run_parts(), parameters, config.combine, seed, scale=world.size)
    norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
    sums = torch.stack([torch.stack([r.loss.detach(), *r.role_sums]) for r in results]).sum(0)
    loss, *role_sums = world.sum(sums).tolist()
    grad_norm = distributed.whole(norm).item()
    # the same numbers on all ranks, so that all take the step or none does
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:  # a bad step must not reach the moments either
        optimizer.step()
    by_role = zip(ROLES, role_sums, counts, strict=True)
    return {
        "step": step + 1,
        "loss": loss,
        **{f"loss/{role}": total / count for role, total, count in by_role if count},
        **{f"cosine/{one}/{other}": value for (one, other), value in cosines.items()},
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": int(tokens),
        "rows": int(sum(counts)),
        "skipped": int(not finite),
        "step_ms": round(1e3 * (time.perf_counter() - start), 1),
    }


class Part:
    """One part of a rank's share of a step: its examples, their pack and their loss."""

    def __init__(self, batch: Batch, objectives: Objectives) -> None:
        """Pack the student's views."""
        self.batch = batch
        self.student: Packed = batch.student()
        self.loss: StepLoss = objectives.for_step(batch.examples, self.student)


def forward(
    config: TrainConfig,
    model: nn.Module,
    objectives: Objectives,
    cache: TeacherCache | None,
    part: Part,
) -> StepResult:
    """Run teacher, student and losses on a part; arguments as in :func:`train_step`."""
    teacher = None
    if objectives.need_teacher:
        teacher = part.batch.teacher() if cache is None else cache.for_batch(part.batch)
    with autocast(config.model, model):
        return model.distill_step(part.student, part.loss, teacher)  # type: ignore


def sampled(config: TrainConfig) -> list[Role]:
    """The roles that every step has examples of, in the order of ``ROLES``."""
    return [role for role in ROLES if config.data.per_step.get(role)]


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in its fused form: three times as fast as the others on the small tensors of LoRA."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, constant middle, linear decay over the last ``decay_fraction`` of the steps.

    Example:
        >>> config = OptimConfig(lr=1.0, warmup_steps=2, decay_fraction=0.5)
        >>> [learning_rate(config, step, 8) for step in range(8)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = config.decay_fraction * steps
    decay = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return config.lr * min(warm, decay)


def _check(config: TrainConfig) -> None:
    """Refuse what each part of the recipe allows, but not together."""
    require_objectives(config)
    if config.model.adapter is None and config.teacher.cache == "off":
        raise UserError(
            "teacher.cache: got off while all weights train, expected memory or disk; the base "
            "model is gone after the first step, so its rows must be kept"
        )


def _used(examples: Iterable[Example], config: TrainConfig) -> list[Example]:
    """Those of the roles that are trained."""
    return [example for example in examples if config.data.per_step.get(example.role)]


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

"""The training loop, from a recipe to an exported model.

.. code-block:: text

    output/
        run.json           resolved configuration, versions, commit
        train_log.jsonl    a line per step
        checkpoints/       the latest ones (see checkpoint.py)
        adapter/ or model/ the result

The loss of a step is a sum over answer rows divided by their number in the step, so it does not
depend on how the step is cut up. Whatever a step needs is a function of the configuration and the
step number, or lies in the checkpoint: a resumed run ends with the same bits.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from bidistill import checkpoint, contrastive, export, run_folder
from bidistill.config import OptimConfig, TrainConfig, require_objectives
from bidistill.data.build import build_store
from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.records import ROLES
from bidistill.data.store import TokenStore
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.models import (
    attach_distill_step,
    autocast,
    load_model,
    load_tokenizer,
    read_logit_transform,
)
from bidistill.objectives import Objectives, StepResult
from bidistill.progress import say, track
from bidistill.teacher import HiddenCache, TeacherCache, contexts_of
from bidistill.teacher_cache import rows_on_disk

CHECKPOINTS = "checkpoints"
STOPPED = 130
"""Exit code after Ctrl-C, by the shell's custom."""


def main(config: TrainConfig, resume: bool = False) -> Path:
    """Train by a recipe and export the result.

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
    _check(config)
    run_folder.check(config, resume)
    if resume and result.exists():
        say(f"{result}: finished already")
        return result
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model.path)
    data = config.data
    examples = build_store(
        data.train,
        tokenizer,
        contexts_of(config.teacher),
        max_answer_tokens=data.max_answer_tokens,
        folder=data.cache,
        workers=data.workers,
    )
    loader = RoleLoader(examples, data.per_step, config.seed, bucket=data.bucket)
    model = load_model(config.model, config.seed)
    objectives = Objectives(config.objectives, read_logit_transform(model))
    attach_distill_step(model)
    adapter, cache = config.model.adapter, None
    with _autocast(config, model):
        if adapter and adapter.contrast:
            contrastive.initialise(model, _used(examples, config), adapter)
        if objectives.need_teacher:
            cache = _cache(config, model, examples)
    run_folder.begin(config)  # nothing was written so far, and little can fail from here on
    train(config, model, loader, objectives, cache)
    if isinstance(model, PeftModel):
        export.weaken(model, config.model.adapter.strength)  # type: ignore
        export.save_adapter(model, result)
    else:
        export.save_merged(model, tokenizer, result)
    say(f"wrote {result}")
    return result


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
) -> None:
    """Run the remaining steps, from the latest checkpoint if there is one.

    Args:
        config: the recipe.
        model: with ``distill_step`` attached.
        loader: gives the batches.
        objectives: the losses.
        cache: the teacher's rows; None computes them in each step.

    Raises:
        SystemExit: interrupted; the checkpoint of the last whole step is written.
    """
    parameters = list(checkpoint.trainable(model).values())
    optimizer = make_optimizer(parameters, config.optim)
    folder = config.output / CHECKPOINTS
    done = Progress()
    if (path := checkpoint.latest(folder)) is not None:
        state = checkpoint.load(path, model, optimizer)
        done = Progress(state["step"], state["skipped"])
        loader.load_state(state["loader"])
        say(f"resuming after step {done.step}")
    model.train()
    batches = islice(loader, config.steps - done.step)
    with run_folder.log(config.output, done.step) as write, _interrupt() as interrupted:
        for batch, loader_state in track(batches, config.steps - done.step, "train"):
            entry = train_step(config, model, optimizer, objectives, cache, batch, done.step)
            done.step += 1
            done.skipped += entry["skipped"]
            write(entry)
            if interrupted() or done.step % config.checkpoint_every == 0:
                state = {"step": done.step, "skipped": done.skipped, "loader": loader_state}
                checkpoint.save(folder, model, optimizer, state, config.keep_checkpoints)
            if interrupted():
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
) -> dict[str, Any]:
    """One update.

    Args:
        config: the recipe.
        model: with ``distill_step`` attached.
        optimizer: over the trainable parameters.
        objectives: the losses.
        cache: the teacher's rows, or None.
        batch: the examples of the step.
        step: number of the step, from 0.

    Returns:
        The line of the log: step (from 1), loss and loss per role in nats per row, grad_norm
        before clipping, lr, tokens of the student's pack, rows, skipped, step_ms.
    """
    start = time.perf_counter()
    lr = learning_rate(config.optim, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    student = batch.student()
    loss_of_step = objectives.for_step(batch.examples, student)
    teacher = None
    if objectives.need_teacher:
        teacher = batch.teacher() if cache is None else cache.for_batch(batch)
    optimizer.zero_grad(set_to_none=True)
    with _autocast(config, model):
        result: StepResult = model.distill_step(student, loss_of_step, teacher)  # type: ignore
    result.loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
    loss, grad_norm = torch.stack([result.loss.detach(), norm]).tolist()
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:  # a bad step must not reach the moments either
        optimizer.step()
    sums = zip(ROLES, result.role_sums.tolist(), loss_of_step.role_counts, strict=True)
    return {
        "step": step + 1,
        "loss": loss,
        **{f"loss/{role}": total / count for role, total, count in sums if count},
        "grad_norm": grad_norm,
        "lr": lr,
        "tokens": student.input_ids.numel(),
        "rows": loss_of_step.num_rows,
        "skipped": int(not finite),
        "step_ms": round(1e3 * (time.perf_counter() - start), 1),
    }


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


def _cache(config: TrainConfig, model: nn.Module, examples: TokenStore) -> TeacherCache | None:
    """The teacher's rows where the recipe wants them; None computes them in each step."""
    if config.teacher.cache == "disk":
        return rows_on_disk(config, model, examples)
    return HiddenCache(model, _used(examples, config)) if config.teacher.cache == "memory" else None


def _used(examples: Iterable[Example], config: TrainConfig) -> list[Example]:
    """Those of the roles that are trained."""
    return [example for example in examples if config.data.per_step.get(example.role)]


def _autocast(config: TrainConfig, model: nn.Module) -> AbstractContextManager[object]:
    return autocast(config.model, model)


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

"""One update: forward and backward of all parts, by all ranks, and the optimiser.

The loss of a step is a sum over answer rows divided by their number in the step, over all ranks and
parts, so it does not depend on how the step is cut up.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from bidistill import combine, distributed
from bidistill.attention import use_packed_attention
from bidistill.config import OptimConfig, TrainConfig
from bidistill.data.loader import Batch
from bidistill.data.packing import Packed
from bidistill.data.records import ROLES
from bidistill.models import autocast
from bidistill.moved import Watch
from bidistill.objectives import Objectives, StepLoss, StepResult
from bidistill.teacher.kinds import Teacher
from bidistill.world import World


def train_step(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objectives: Objectives,
    teacher: Teacher,
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
        teacher: gives the rows that the losses compare with.
        batch: this rank's examples of the step.
        step: number of the step, from 0.
        world: the ranks that share the step; None: this process alone.

    Returns:
        The line of the log, the same on all ranks but for step_ms: step (from 1), loss and loss per
        role in nats per row, the cosine of each pair of roles' gradients if the combiner needs
        them, grad_norm before clipping, lr, the share of the trained weights that moved, tokens of
        the student's packs, rows, skipped, step_ms.
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
                results.append(forward(config, model, teacher, part))
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
    # all take the step or none does, also where one rank alone sees a norm that is not finite
    finite = math.isfinite(loss) and not world.any(not math.isfinite(grad_norm))
    moved = 0.0
    if finite:  # a bad step must not reach the moments either
        watch = Watch(parameters)
        optimizer.step()
        moved = watch.share(world)
    teacher.after_step(finite)
    by_role = zip(ROLES, role_sums, counts, strict=True)
    return {
        "step": step + 1,
        "loss": loss,
        **{f"loss/{role}": total / count for role, total, count in by_role if count},
        **{f"cosine/{one}/{other}": value for (one, other), value in cosines.items()},
        "grad_norm": grad_norm,
        "lr": lr,
        "moved": moved,
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
    teacher: Teacher,
    part: Part,
) -> StepResult:
    """Run teacher, student and losses on a part; arguments as in :func:`train_step`."""
    rows = teacher.rows(part.batch)
    with autocast(config.model, model):
        return model.distill_step(part.student, part.loss, rows)  # type: ignore


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

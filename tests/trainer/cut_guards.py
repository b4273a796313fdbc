"""What the tests of guards run on ranks, and the same on one process by other means."""

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bidistill import checkpoint, combine, distributed, guards, moved, update
from bidistill.config import GuardConfig, OptimConfig, TrainConfig
from bidistill.data.loader import RoleLoader
from bidistill.data.records import ROLES
from bidistill.data.views import Example, build_examples
from bidistill.guards import KLGuard
from bidistill.models import attach_distill_step
from bidistill.objectives import Objectives
from bidistill.prepare import prepare
from bidistill.teacher.kinds import Base
from bidistill.train import main
from bidistill.update import make_optimizer, train_step
from bidistill.world import World, join
from bidistill_kernels import LogitTransform
from tests.trainer import cut
from tests.trainer.cut import Case
from tests.trainer.tiny import make_model, make_tokenizer


def examples_of(count: int | None = None) -> list[Example]:
    """Of all roles: two of them have a context, which only a teacher reads."""
    return build_examples(cut.records(), make_tokenizer(), cut.CONTEXTS)[:count]


def move(model: Any) -> None:
    """Give all that trains other values, the same however the model is shared out."""
    generator = torch.Generator().manual_seed(1)
    for parameter in checkpoint.trainable(model).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = distributed.whole(parameter.detach()) + 0.03 * noise
        distributed.put(parameter, values.to(parameter.dtype))


def guarded(case: Case, count: int | None = None, chunk: int = 8192, alone: bool = False) -> Any:
    """KL before the weights are moved, and after, measured twice; whether the model trains then."""
    world = World() if alone else join()
    config = replace(cut.config_of(case), guard=GuardConfig(kl_budget=1.0, roles=ROLES))
    model = cut.model_of(case, world)
    with mock.patch.object(guards, "CHUNK_TOKENS", chunk):
        guard = KLGuard(config, examples_of(count), model, LogitTransform(), world)
    before = guard.measure()
    move(model)
    after = guard.measure(), guard.measure()
    whole = [p for p in checkpoint.trainable(model).values() if world.size > 1]
    assert all(hasattr(p, "placements") for p in whole), "a rank was left with whole parameters"
    return before, *after, model.training, len(guard.packs)


def fresh(config: TrainConfig) -> float:
    """KL of a run's guard before any step."""
    guard = prepare(config, join()).guard
    assert isinstance(guard, KLGuard)
    return guard.measure()


def run(config: TrainConfig) -> str:
    """A whole run; its result, or what it was refused with."""
    try:
        return str(main(config))
    except guards.UserError as error:
        return str(error)


class Poisoned(NamedTuple):
    """What became of a bad step, and of a good one after it."""

    unmoved: bool
    """Whether each weight and moment that this rank holds is as it was before the bad step."""
    moved: bool
    """Whether the good one moved weights."""
    log: list[dict[str, Any]]
    finite_here: bool
    """Whether all gradients that this rank held in the bad step were finite."""
    weights: list[Tensor]


def poisoned(case: Case, how: str) -> Poisoned:
    """Two steps; in the first of them, the second rank has a gradient that is not finite."""
    world = join()
    config, model = cut.config_of(case), cut.model_of(case, world)
    named = checkpoint.trainable(model)
    optimizer = make_optimizer(list(named.values()), config.optim)
    objectives, log, held, finite = Objectives(cut.OBJECTIVES), [], [], []
    loader = RoleLoader(examples_of(), cut.PER_STEP, 0, rank=world.rank, world_size=world.size)
    forward, backward = update.forward, combine.backward

    def bad_forward(*arguments: Any) -> Any:
        result = forward(*arguments)
        if how == "backward" and world.rank == 1:
            result.loss.register_hook(lambda gradient: gradient * torch.nan)
        return result

    def bad_backward(*arguments: Any, **keywords: Any) -> Any:
        found = backward(*arguments, **keywords)
        gradients = [distributed.held(p.grad) for p in named.values() if p.grad is not None]
        if how == "part" and world.rank == 1:
            next(g for g in gradients if g.numel()).flatten()[-1] = torch.inf
        finite.append(all(bool(g.isfinite().all()) for g in gradients))
        return found

    def look() -> None:
        held.append([distributed.held(p.detach()).clone() for p in named.values()])

    look()
    for step, (batch, _) in enumerate(islice(loader, 2)):
        with (
            mock.patch.object(update, "forward", forward if step else bad_forward),
            mock.patch.object(combine, "backward", backward if step else bad_backward),
        ):
            log.append(train_step(config, model, optimizer, objectives, Base(), batch, step, world))
        if step == 0:
            empty = not optimizer.state
        look()
    same = [
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in pairwise(held)
    ]
    whole = [distributed.whole(p.detach()) for p in named.values()]
    return Poisoned(same[0] and empty, not same[1], log, finite[0], whole)


def moves(
    shard: int | None, dtype: torch.dtype, alone: bool = False, sample: int = 1 << 20
) -> tuple[float, float]:
    """Share of weights that a step of AdamW moves by the log, and by copies of all weights."""
    world = World() if alone else join()
    case = Case("full", shard=shard, double=False)
    config = replace(cut.config_of(case), optim=OptimConfig(lr=3e-4, warmup_steps=0))
    model: Any = make_model()  # tied: an embedding of its own has rows without a gradient
    attach_distill_step(model)
    model.to(dtype)
    distributed.shard(model, config.parallel, world, torch.float32)
    model.train()
    named = checkpoint.trainable(model)
    optimizer = make_optimizer(list(named.values()), config.optim)
    loader = RoleLoader(examples_of(), cut.PER_STEP, 0, rank=world.rank, world_size=world.size)
    before = [distributed.whole(p.detach()).clone() for p in named.values()]
    batch, _ = next(iter(loader))
    with mock.patch.object(moved, "SAMPLE", sample):
        entry = train_step(
            config, model, optimizer, Objectives(cut.OBJECTIVES), Base(), batch, 0, world
        )
    after = [distributed.whole(p.detach()) for p in named.values()]
    changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    return entry["moved"], changed / sum(b.numel() for b in before)

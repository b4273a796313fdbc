"""A short run by a teacher of each kind, whole or on the ranks of this process group."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bidistill import checkpoint, distributed
from bidistill.checkpoint_writer import Writer
from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.views import build_examples
from bidistill.models import attach_distill_step, autocast
from bidistill.objectives import Objectives
from bidistill.teacher.kinds import Ema, Frozen, Live, Teacher
from bidistill.teacher.rows import TeacherRows
from bidistill.update import make_optimizer, train_step
from bidistill.world import World, join
from tests.trainer.cut import (
    CONTEXTS,
    OBJECTIVES,
    PER_STEP,
    Case,
    Outcome,
    config_of,
    double,
    model_of,
    records,
    train,
)
from tests.trainer.tiny import make_model, make_tokenizer

DECAY = 0.75
WIDTH = 48
"""Of the frozen teacher; the student's is 32."""


def maker(case: Case, kind: str) -> Callable[[Any, World], Teacher]:
    """Makes a teacher once the student is shared out."""
    config = config_of(case)

    def make(model: Any, world: World) -> Teacher:
        if kind == "live":
            return Live(model, config.model)
        if kind == "ema":
            return Ema(model, config.model, DECAY)
        frozen = frozen_model(case)
        attach_distill_step(frozen)
        distributed.shard(frozen, config.parallel, world, getattr(torch, case.dtype))
        return Frozen(frozen, config.model)

    return make


def frozen_model(case: Case) -> Any:
    """Wider than the student, with weights of its own."""
    model = make_model(case.tied, seed=1, width=WIDTH).requires_grad_(False)
    if case.double:
        double(model)
    return model


def run(case: Case, kind: str, alone: bool = False) -> Outcome:
    """Train for a few steps; no rank may be left with more than its own parts."""
    world = World() if alone else join()
    made: list[Any] = []

    def make(model: Any, world: World) -> Teacher:
        made.append(maker(case, kind)(model, world))
        return made[0]

    outcome = train(case, world, make)
    parts = [*made[0].model.parameters(), *made[0].tensors().values()]
    assert world.size == 1 or all(isinstance(part, DTensor) for part in parts)
    return outcome


def rows_of_averages(case: Case, alone: bool = False) -> list[dict[str, Tensor]]:
    """Rows and head by averages that are far from the weights; and with the averages as weights."""
    world = World() if alone else join()
    model, teacher, _ = _parts(case, world)
    with torch.no_grad():
        for average in teacher.averages.values():
            average.mul_(0.5)
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    batch = Batch(tuple(examples[:4]))
    settings = config_of(case).model
    found = [Live(model, settings).rows(batch), teacher.rows(batch)]
    with torch.no_grad():
        for name, weight in teacher.trained.items():
            weight.copy_(teacher.averages[name])
    distributed.put_back(model)
    with autocast(settings, model):
        found.append(model.own_rows(batch.teacher(), head=teacher.head_trains))
    assert not torch.equal(found[0].hidden, found[1].hidden)
    return [
        {
            n: t.detach().clone()
            for n in TeacherRows.__slots__
            if (t := getattr(rows, n)) is not None
        }
        for rows in found[1:]
    ]


def saved(case: Case, folder: Path, background: bool = False) -> dict[str, Tensor]:
    """Two steps by a moving average and a checkpoint; what is then, and after one more step."""
    world = join()
    model, teacher, optimizer = _parts(case, world)
    _steps(case, model, teacher, optimizer, world, range(2))
    with Writer(folder, 1, world, background=background) as writer:
        writer.save(model, optimizer, {"step": 2}, teacher.tensors())
    return _state(case, model, teacher, optimizer, world)


def restored(case: Case, folder: Path, alone: bool = False) -> dict[str, Tensor]:
    """The same from the checkpoint, into averages that are others before."""
    world = World() if alone else join()
    model, teacher, optimizer = _parts(case, world)
    with torch.no_grad():
        for tensor in (*checkpoint.trainable(model).values(), *teacher.averages.values()):
            tensor.mul_(-0.5)
    path = checkpoint.latest(folder)
    assert path is not None
    checkpoint.load(path, model, optimizer, world, teacher.tensors())
    return _state(case, model, teacher, optimizer, world)


def _parts(case: Case, world: World) -> tuple[Any, Ema, torch.optim.Optimizer]:
    model, config = model_of(case, world), config_of(case)
    teacher = Ema(model, config.model, DECAY)
    return model, teacher, make_optimizer(list(teacher.trained.values()), config.optim)


def _state(
    case: Case, model: Any, teacher: Ema, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Tensor]:
    """Whole averages; and the weights after one more step, in which the teacher has its say."""
    found = {f"teacher/{n}": distributed.whole(t).clone() for n, t in teacher.averages.items()}
    _steps(case, model, teacher, optimizer, world, range(2, 3))
    after = checkpoint.trainable(model).items()
    return found | {n: distributed.whole(p.detach()).clone() for n, p in after}


def _steps(
    case: Case,
    model: Any,
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    world: World,
    steps: range,
) -> None:
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    loader = RoleLoader(examples, PER_STEP, 0, rank=world.rank, world_size=world.size)
    objectives = Objectives(OBJECTIVES)
    for step, (batch, _) in enumerate(islice(loader, steps.stop)):
        if step in steps:
            train_step(config_of(case), model, optimizer, objectives, teacher, batch, step, world)

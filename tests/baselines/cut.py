"""A short run of a method, whole or cut up among ranks and in time."""

from dataclasses import replace
from itertools import islice

import torch

from bidistill import checkpoint
from bidistill.baselines.methods import methods
from bidistill.config import ObjectiveConfig
from bidistill.data.loader import RoleLoader
from bidistill.data.records import Record, Role
from bidistill.data.views import build_examples
from bidistill.objectives import Objectives
from bidistill.settings import check
from bidistill.teacher.kinds import Base
from bidistill.update import train_step
from bidistill.world import World, join
from tests.trainer.cut import STEPS, Case, Outcome, config_of, model_of, outcome
from tests.trainer.tiny import make_tokenizer

PER_STEP: dict[Role, int] = {"forget": 3, "gold": 3, "neighbor": 2, "retain": 1}


def records() -> list[Record]:
    """Of uneven lengths."""
    return [
        Record(
            id=f"{role}{n}",
            role=role,
            question=f"{role} {'x' * (5 * n)}?",
            answer=f"{'city ' * (1 + n * n)}.",
        )
        for role, count in PER_STEP.items()
        for n in range(count + 1)
    ]


def objectives_of(method: str) -> dict[Role, ObjectiveConfig]:
    """Those of a method; a layer that a model of three has."""
    found = {r: check(ObjectiveConfig, o) for r, o in methods()[method]["objectives"].items()}
    if method == "rmu":
        return {r: replace(o, options=o.options | {"layer": 1}) for r, o in found.items()}
    return found


def run(case: Case, method: str) -> Outcome:
    """Train on the ranks of this process group."""
    return train(case, method, join())


def train(case: Case, method: str, world: World) -> Outcome:
    """Train for a few steps with plain gradient descent."""
    objectives = objectives_of(method)
    per_step = {role: count for role, count in PER_STEP.items() if role in objectives}
    model = model_of(case, world)
    examples = build_examples(records(), make_tokenizer(), {})
    optimizer = torch.optim.SGD(checkpoint.trainable(model).values())
    shares = {"rank": world.rank, "world_size": world.size, "parts": case.accumulate}
    apart = () if case.combine == "sum" else per_step
    losses = Objectives(objectives, apart=apart)
    batches = islice(RoleLoader(examples, per_step, 0, **shares), STEPS)
    log = [
        train_step(config_of(case), model, optimizer, losses, Base(), batch, step, world)
        for step, (batch, _) in enumerate(batches)
    ]
    return outcome(model, log)

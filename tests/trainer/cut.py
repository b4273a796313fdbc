"""One short training run, whole or cut up among ranks and in time, and what came of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bidistill import checkpoint, distributed, run_folder
from bidistill.checkpoint_writer import Writer
from bidistill.config import (
    LINEAR_LAYERS,
    DataConfig,
    LoraSettings,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.records import Record, Role
from bidistill.data.views import Message, build_examples
from bidistill.errors import UserError
from bidistill.models import add_adapter, attach_distill_step
from bidistill.objectives import Objectives
from bidistill.teacher.compute import HiddenCache
from bidistill.teacher.kinds import Base, Kept, Teacher
from bidistill.update import make_optimizer, train_step
from bidistill.world import World, join
from tests.support import Wide
from tests.trainer.tiny import SHOTS, make_model, make_tokenizer, randomise_adapters

CONTEXTS: dict[Role, Sequence[Message]] = {"forget": SHOTS, "adversarial": SHOTS}
KL = ObjectiveConfig(loss="bidirectional_kl")
OBJECTIVES: dict[Role, ObjectiveConfig] = {
    "forget": ObjectiveConfig(loss="push_pull", options={"k_pull": 4, "k_push": 4}),
    "adversarial": replace(KL, positions="first", weight=2.0),
    "neighbor": KL,
    "retain": ObjectiveConfig(loss="jsd", weight=0.5),
}
PER_STEP: dict[Role, int] = {"forget": 2, "adversarial": 2, "neighbor": 3, "retain": 1}
STEPS = 3


class Case(NamedTuple):
    """How a run is made and cut."""

    training: str
    """"lora", "lora, head too", "full", or "full, head frozen"."""
    tied: bool = True
    shard: int | None = None
    accumulate: int = 1
    recompute: bool = False
    dtype: str = "float32"
    double: bool = True
    """In fp64, where an error in the cut shows and rounding does not."""
    live: bool = False
    """Whether the teacher runs in each step; else its rows are kept."""
    combine: str = "sum"
    offload: bool = False


class Outcome(NamedTuple):
    """What a run gave, whole tensors on the CPU."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the last step."""
    log: list[dict[str, Any]]
    largest_part: int
    """Elements of weights that one rank holds."""


def config_of(case: Case) -> TrainConfig:
    targets = (*LINEAR_LAYERS, "lm_head") if case.training.endswith("head too") else LINEAR_LAYERS
    lora = case.training.startswith("lora")
    adapter = LoraSettings(rank=2, targets=targets) if lora else None
    return TrainConfig(
        model=ModelConfig(path="", dtype=case.dtype, adapter=adapter),  # type: ignore
        data=DataConfig(train=Path(), per_step=PER_STEP),
        objectives=OBJECTIVES,
        # small steps: a random model is far from smooth, and must not make much of rounding
        optim=OptimConfig(lr=1e-4, warmup_steps=0, clip_norm=1e9),
        parallel=ParallelConfig(
            shard=case.shard,
            accumulate=case.accumulate,
            recompute=case.recompute,
            offload=case.offload,
        ),
        combine=case.combine,  # type: ignore
        steps=STEPS,
        output=Path(),
    )


def records() -> list[Record]:
    """Of uneven lengths."""
    made = []
    for role, count in {"forget": 5, "adversarial": 4, "neighbor": 7, "retain": 3}.items():
        for n in range(count):
            answer = " unknown." if role in CONTEXTS else f" {'city ' * (1 + n * n)}"
            prefill = "It is" if role == "adversarial" else ""
            question = f"{role} {'x' * (5 * n)}?"
            made.append(
                Record(
                    id=f"{role}{n}", role=role, question=question, answer=answer, prefill=prefill
                )  # type: ignore
            )
    return made


def run(case: Case) -> Outcome:
    """Train for a few steps with plain gradient descent, on the ranks of this process group."""
    return train(case, join())


def train(
    case: Case, world: World, make_teacher: Callable[[Any, World], Teacher] | None = None
) -> Outcome:
    """The same for a given world, and by a teacher of the shared-out student's making."""
    config, model = config_of(case), model_of(case, world)
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    if make_teacher:
        teacher = make_teacher(model, world)
    else:
        teacher = Base() if case.live else Kept(HiddenCache(model, examples))
    named = checkpoint.trainable(model)
    optimizer = torch.optim.SGD(named.values())
    shares = {"rank": world.rank, "world_size": world.size, "parts": case.accumulate}
    batches = islice(RoleLoader(examples, PER_STEP, 0, **shares), STEPS)
    objectives = Objectives(OBJECTIVES, apart=() if case.combine == "sum" else PER_STEP)
    log = [
        train_step(config, model, optimizer, objectives, teacher, batch, step, world)
        for step, (batch, _) in enumerate(batches)
    ]
    return outcome(model, log)


def model_of(case: Case, world: World) -> Any:
    """A model in training, shared out among the ranks."""
    config = config_of(case)
    model: Any = make_model(tied=case.tied)
    if config.model.adapter:
        model = add_adapter(model, config.model.adapter)
        randomise_adapters(model)
        for parameter in checkpoint.trainable(model).values():
            parameter.data *= 0.1  # a smooth model does not make much of rounding
    if case.training == "full, head frozen":
        model.lm_head.weight.requires_grad_(False)
    attach_distill_step(model)
    if case.double:
        double(model)
    distributed.shard(model, config.parallel, world, getattr(torch, case.dtype))
    return model.train()


def double(model: Any) -> None:
    """Have a model compute in fp64, all of it."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.forward = widened(module.forward)


def widened(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that stays in fp64."""

    def wide(*args: Any, **kwargs: Any) -> Any:
        with Wide():
            return forward(*args, **kwargs)

    return wide


def outcome(model: Any, log: list[dict[str, Any]]) -> Outcome:
    """Whole weights and gradients, and how much of the model this rank holds."""
    named = checkpoint.trainable(model)
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return Outcome(
        {name: distributed.whole(p.detach()) for name, p in named.items()},
        {name: distributed.whole(p.grad) for name, p in named.items() if p.grad is not None},
        log,
        sum(part.numel() for part in held),
    )


def with_an_idle_rank(case: Case, alone: bool = False) -> Outcome:
    """One step in which only the first rank has rows that count."""
    world = World() if alone else join()
    config, model = config_of(case), model_of(case, world)
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)[:6]
    if world.rank:
        examples = [replace(example, answer_ids=()) for example in examples[:1]]
    optimizer = torch.optim.SGD(checkpoint.trainable(model).values())
    batch, objectives = Batch(tuple(examples)), Objectives(OBJECTIVES)
    log = [train_step(config, model, optimizer, objectives, Base(), batch, 0, world)]
    return outcome(model, log)


def saved(case: Case, folder: Path, background: bool = False) -> dict[str, Tensor]:
    """Train with AdamW, save a checkpoint; returns weights, moments and what comes next."""
    world = join()
    model = model_of(case, world)
    optimizer = _adam_steps(case, model, world, range(2))
    with Writer(folder, 1, world, background=background) as writer:
        writer.save(model, optimizer, {"step": 2})
    return _state(case, model, optimizer, world)


def failing(case: Case, folder: Path, rank: int, background: bool) -> str:
    """Two checkpoints, on a disk that is full for one rank; returns what this one is told."""
    world = join()
    model = model_of(case, world)
    optimizer = make_optimizer(list(checkpoint.trainable(model).values()), OptimConfig())
    write_data = checkpoint.HuggingFaceStorageWriter.write_data

    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    if world.rank == rank:
        checkpoint.HuggingFaceStorageWriter.write_data = full
    try:
        with Writer(folder, 2, world, background=background) as writer:
            for step in (1, 2):
                writer.save(model, optimizer, {"step": step})
    except UserError as error:
        return str(error)
    finally:
        checkpoint.HuggingFaceStorageWriter.write_data = write_data
    return ""


def shares_a_disk(folder: Path) -> None:
    """All ranks see what the first one writes."""
    run_folder.require_shared(folder, join())


def restored(case: Case, folder: Path, alone: bool = False) -> dict[str, Tensor]:
    """Load the checkpoint into another model; returns what `saved` does."""
    world = World() if alone else join()
    model = model_of(case, world)
    with torch.no_grad():  # what is loaded must not have been there before
        for parameter in checkpoint.trainable(model).values():
            parameter.mul_(-0.5)
    optimizer = make_optimizer(list(checkpoint.trainable(model).values()), OptimConfig())
    path = checkpoint.latest(folder)
    assert path is not None
    assert checkpoint.load(path, model, optimizer, world) == {"step": 2}
    return _state(case, model, optimizer, world)


def _state(
    case: Case, model: Any, optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Tensor]:
    """Whole weights and moments; a random number; and the weights after one more step."""
    named = checkpoint.trainable(model)
    state = {f"weights/{name}": distributed.whole(p.detach()).clone() for name, p in named.items()}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = distributed.whole(value).clone()
    state["random"] = torch.rand(1)
    _adam_steps(case, model, world, range(2, 3), optimizer)
    after = {f"after/{name}": distributed.whole(p.detach()) for name, p in named.items()}
    return state | after


def _adam_steps(
    case: Case,
    model: Any,
    world: World,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Take some steps of a run by the trainer's own optimiser; the teacher runs in each."""
    config = config_of(case)
    optimizer = optimizer or make_optimizer(
        list(checkpoint.trainable(model).values()), config.optim
    )
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    loader = RoleLoader(examples, PER_STEP, 0, rank=world.rank, world_size=world.size)
    objectives = Objectives(OBJECTIVES)
    for step, (batch, _) in enumerate(islice(loader, steps.stop)):
        if step in steps:
            train_step(config, model, optimizer, objectives, Base(), batch, step, world)
    return optimizer

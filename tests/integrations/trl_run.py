"""Runs of TRL's trainers that tests compare: by its own classes and by ours, here and on ranks.

What would be sampled is given; all else is TRL's own loop.
"""

import importlib
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor
from torch import distributed as dist

from examples.tiny import make_pairs

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "optim": "sgd",  # Adam makes much of small differences
    "lr_scheduler_type": "constant",
    "learning_rate": 2.0,  # far beyond the rounding of what is added to
    "max_grad_norm": 0.0,  # clipping hides a loss of the wrong scale
    "max_steps": 2,
}
PLACES = {
    "distillation": ("examples.trl_distillation", "trl", "DistillationTrainer"),
    "sdft": ("examples.trl_sdft", "trl.experimental.sdft", "SDFTTrainer"),
}
"""Of the example, of TRL's own class, and its name."""
ANSWERS = {tuple(pair["prompt_ids"]): pair["answer_ids"] for pair in make_pairs()}
LOGGED = "loss", "entropy", "sdft/distillation_loss"


class Case(NamedTuple):
    """What is trained, and by whom."""

    name: str
    """One of `PLACES`."""
    options: dict[str, Any]
    """Of the trainer's config."""
    adapter: bool = False
    own: bool = False
    """Whether by TRL's own class."""
    accumulate: int = 1


class Outcome(NamedTuple):
    """What a run gave."""

    log: list[dict[str, float]]
    """What there is of `LOGGED`, of each update."""
    moved: dict[str, Tensor]
    """By how much each weight that trains has changed."""
    tokens: list[int]
    """That this rank was given, each time it would have sampled."""


def make(case: Case, folder: str, **options: Any) -> Any:
    """The trainer of an example, which is given the answers."""
    example, package, kind = PLACES[case.name]
    module = importlib.import_module(example)
    source = importlib.import_module(package) if case.own else module
    lora = LoraConfig(**LORA) if case.adapter else None
    options = {**OPTIONS, **case.options, **options}
    trainer = module.make_trainer(folder, getattr(source, kind), lora, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # of zeros, the other half would have no gradient
            parameter.data.normal_(std=0.1, generator=generator)
    trainer.given = []

    def answers(prompts: list[list[int]], *_: object) -> list[list[int]]:
        found = [ANSWERS[tuple(ids)] for ids in prompts]
        trainer.given.append(sum(map(len, found)))
        return found

    if case.name == "distillation":
        trainer._generate_single_turn = answers
    else:
        trainer._generate = lambda prompts: (prompts, answers(prompts))
    return trainer


def fit(case: Case, saved: Path | None = None) -> Outcome:
    """Train by updates of all pairs, of which each rank has its share.

    Args:
        case: what is trained.
        saved: on ranks, a folder with the model: transformers saves it on the first of them only.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with TemporaryDirectory() as folder:
        if saved:
            shutil.copytree(saved, folder, dirs_exist_ok=True)
        trainer = make(
            case,
            folder,
            per_device_train_batch_size=len(ANSWERS) // ranks // case.accumulate,
            gradient_accumulation_steps=case.accumulate,
        )
        named = dict(trainer.model.named_parameters())
        before = {n: p.detach().clone() for n, p in named.items() if p.requires_grad}
        trainer.train()
    log = [
        {key: line[key] for key in LOGGED if key in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    moved = {name: named[name].detach() - start for name, start in before.items()}
    return Outcome(log, moved, trainer.given)


def fit_with_nothing_on_the_last_rank(case: Case, saved: Path) -> Outcome:
    """The same where none of the last rank's tokens count."""
    if dist.get_rank() == dist.get_world_size() - 1:
        case = case._replace(options={**case.options, "num_loss_tokens_to_skip": 99})
    return fit(case, saved)

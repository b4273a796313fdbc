"""What a recipe is made into before the first step: model, batches, losses, teacher."""

from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill import contrastive, guards
from bidistill.baselines import layer
from bidistill.config import TrainConfig, require_objectives
from bidistill.data.loader import RoleLoader
from bidistill.data.records import ROLES, Role
from bidistill.guards import Guard
from bidistill.loading import file_checksums, load_shared, load_tokenizer
from bidistill.models import autocast
from bidistill.objectives import Objectives, needs_teacher
from bidistill.teacher import kinds as teachers
from bidistill.teacher import model as teacher_model
from bidistill.teacher.cache import rows_on_disk
from bidistill.teacher.compute import examples_of
from bidistill.teacher.kinds import Kept, Teacher
from bidistill.world import World


class Ready(NamedTuple):
    """What a recipe is made into before the first step."""

    model: PreTrainedModel | PeftModel
    """With its root methods attached, and shared out among the ranks."""
    tokenizer: PreTrainedTokenizerBase
    loader: RoleLoader
    objectives: Objectives
    teacher: Teacher
    guard: Guard


def prepare(config: TrainConfig, world: World) -> Ready:
    """Load and build all that training needs; nothing is written to the output folder.

    Args:
        config: the recipe.
        world: the ranks that train together; all must call it.

    Raises:
        UserError: something in the recipe or the files it names cannot be used.
    """
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model.path)
    teacher_model.check_vocabulary(config, tokenizer)
    data, parallel = config.data, config.parallel
    with world.first_before_others():  # who finds the store and who makes it
        examples = examples_of(config, tokenizer)
    guarded = guards.choose(config, examples)
    loader = RoleLoader(
        examples,
        data.per_step,
        config.seed,
        rank=world.rank,
        world_size=world.size,
        parts=parallel.accumulate,
        bucket=data.bucket,
    )
    apart = () if config.combine == "sum" else sampled(config)
    teacher = None if needs_teacher(config.objectives) else Teacher()
    if teacher is None and config.teacher.kind == "frozen":
        # before the student is there: two models would be too many where its rows are kept
        teacher = teachers.frozen(config, examples, world)
    model = load_shared(config.model, parallel, world, config.seed)
    own, theirs = teacher_model.transforms(config, model)
    objectives = Objectives(config.objectives, own, apart, theirs, parallel.chunk_bytes)
    adapter = config.model.adapter
    with autocast(config.model, model):
        if adapter and adapter.contrast:
            contrastive.initialise(model, teachers.used(examples, config), adapter, world)
        if teacher is None and config.teacher.on_disk:
            teacher = Kept(rows_on_disk(config, lambda: model, examples, world))
        if teacher is None:
            teacher = teachers.of_student(config, model, examples)
    guard = guards.make(config, guarded, model, own, world)
    if world.rank:
        torch.manual_seed(config.seed + world.rank)  # dropout of its own
    return Ready(model, tokenizer, loader, objectives, teacher, guard)


def checksums(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Of the files of the models that a recipe names, by key; they are read to the end."""
    paths = {"model.path": config.model.path, "teacher.path": config.teacher.path}
    return {key: file_checksums(path) for key, path in paths.items() if path is not None}


def sampled(config: TrainConfig) -> list[Role]:
    """The roles that every step has examples of, in the order of ``ROLES``."""
    return [role for role in ROLES if config.data.per_step.get(role)]


def check(config: TrainConfig) -> None:
    """Refuse what each part of the recipe allows, but not together."""
    require_objectives(config)
    teacher_model.check(config)
    Objectives(config.objectives)  # their options, before rows are computed for long
    layer.check(config)

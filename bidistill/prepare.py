"""What a recipe is made into before the first step: model, batches, losses, teacher's rows."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill import contrastive, distributed, options
from bidistill.config import TrainConfig, require_objectives
from bidistill.data.build import build_store
from bidistill.data.loader import RoleLoader
from bidistill.data.records import ROLES, Role
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.loading import load_shared, load_tokenizer, model_folder
from bidistill.models import autocast, read_logit_transform
from bidistill.objectives import Objectives
from bidistill.teacher import HiddenCache, TeacherCache, contexts_of
from bidistill.teacher_cache import rows_on_disk
from bidistill.world import World


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
    model = load_shared(config.model, parallel, world, config.seed)
    apart = () if config.combine == "sum" else sampled(config)
    objectives = Objectives(config.objectives, read_logit_transform(model), apart)
    distributed.put_back(model)
    adapter = config.model.adapter
    cache: TeacherCache | None = None
    with autocast(config.model, model):
        if adapter and adapter.contrast:
            contrastive.initialise(model, _used(examples, config), adapter)
        if objectives.need_teacher and config.teacher.cache == "disk":
            cache = rows_on_disk(config, model, examples, world)
        if objectives.need_teacher and config.teacher.cache == "memory":
            cache = HiddenCache(model, _used(examples, config))
    if world.rank:
        torch.manual_seed(config.seed + world.rank)  # dropout of its own
    return Ready(model, tokenizer, loader, objectives, cache)


def sampled(config: TrainConfig) -> list[Role]:
    """The roles that every step has examples of, in the order of ``ROLES``."""
    return [role for role in ROLES if config.data.per_step.get(role)]


def _check(config: TrainConfig) -> None:
    """Refuse what each part of the recipe allows, but not together."""
    require_objectives(config)
    options.check(config.model, model_folder(config.model.path))
    if config.model.adapter is None and config.teacher.cache == "off":
        raise UserError(
            "teacher.cache: got off while all weights train, expected memory or disk; the base "
            "model is gone after the first step, so its rows must be kept"
        )


def _used(examples: Iterable[Example], config: TrainConfig) -> list[Example]:
    """Those of the roles that are trained."""
    return [example for example in examples if config.data.per_step.get(example.role)]

"""Finding the store of a recipe's teacher, and making it where there is none.

A store lies under a key: a hash of all that its rows follow from, but for the rounding of device
and kernels. So runs share it as long as model, examples and contexts are the same, whatever a
recipe says of losses, steps or ranks of adapters; one that has the best ids of each row, also where
their number is the same.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bidistill.config import TrainConfig
from bidistill.data.store import Selection, TokenStore
from bidistill.distributed import put_back
from bidistill.errors import UserError
from bidistill.files import user_cache
from bidistill.loading import file_checksums, load_shared, load_tokenizer
from bidistill.models import autocast, read_logit_transform
from bidistill.objectives import needs_teacher
from bidistill.progress import say
from bidistill.teacher import model as teacher_model
from bidistill.teacher.build import build_rows
from bidistill.teacher.compute import examples_of
from bidistill.teacher.forms import Best, Form, Hidden
from bidistill.teacher.store import FORMAT, TeacherStore, problem_of
from bidistill.world import World, device, join


def main(config: TrainConfig, *, check: bool = False) -> Path:
    """Make the store of a recipe unless it is there; say where it lies and what it takes.

    Under ``torchrun`` all ranks make it together, and none holds the whole model.

    A store that is there is compared with its checksums, and made again where it is damaged.

    Args:
        config: the recipe; a store of hidden rows is made unless ``teacher.cache`` is ``topk``.
        check: compare only.

    Returns:
        The folder of the store.

    Raises:
        UserError: something in the recipe or the files it names cannot be used; with ``check``,
            also that the store is missing or damaged.
    """
    world = join()
    if config.teacher.kind in ("live", "ema") and config.teacher.cache == "off":
        raise UserError(
            f"teacher.kind: got {config.teacher.kind}, whose rows change with every step, expected "
            "base or frozen; there is nothing to keep"
        )
    if not needs_teacher(config.objectives):
        raise UserError(
            "objectives: got none that compares with a teacher, expected one; there is nothing to "
            "keep"
        )
    kept = "topk" if config.teacher.cache == "topk" else "disk"
    teacher_model.check(replace(config, teacher=replace(config.teacher, cache=kept)))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model.path)
    teacher_model.check_vocabulary(config, tokenizer)
    with world.first_before_others():
        tokens = examples_of(config, tokenizer)
    examples = selected(config, tokens)
    folder, made_of, problem = _look(config, examples, world, thorough=True)
    if problem and check:
        raise UserError(f"{problem}; run bidistill teacher-cache without --check to make it again")
    if problem:
        _build(config, lambda: _load(config, world), examples, folder, made_of, world)
    else:
        say(f"{folder}: whole, all checksums are right")
    store = TeacherStore(folder, verify=False)
    say(f"{store.tokens} answer tokens, {store.bytes_per_token} bytes each")
    if not config.teacher.on_disk and not check:
        say("bidistill train uses it with teacher.cache=disk")
    return folder


def _load(config: TrainConfig, world: World) -> nn.Module:
    """The teacher's model, shared out among the ranks."""
    if config.teacher.kind == "frozen":
        return teacher_model.load(config, world)
    model = load_shared(config.model, config.parallel, world, config.seed)
    read_logit_transform(model)  # refuses a model whose head it does not understand
    put_back(model)
    return model


def rows_on_disk(
    config: TrainConfig,
    load: Callable[[], nn.Module],
    tokens: TokenStore,
    world: World | None = None,
) -> TeacherStore:
    """Open the store of a recipe; make it if it is not there or damaged.

    What is found is checked by sizes and headers; set the environment variable
    ``BIDISTILL_VERIFY=1`` to compare checksums. All ranks come here together and make the store
    together; the first one does the checking.

    Args:
        config: the recipe.
        load: gives the teacher's model, untrained; called if the store is to be made.
        tokens: all examples of the recipe.
        world: the ranks; None: this process alone.

    Raises:
        UserError: the folder cannot be written.
    """
    examples = selected(config, tokens)
    world = world or World()
    thorough = os.environ.get("BIDISTILL_VERIFY") == "1"
    folder, made_of, problem = _look(config, examples, world, thorough=thorough)
    if problem:
        _build(config, load, examples, folder, made_of, world)
    return TeacherStore(folder, device=device(), verify=False)


def selected(config: TrainConfig, tokens: TokenStore) -> Selection:
    """The examples of the roles that a recipe trains."""
    return Selection(tokens, [role for role, count in config.data.per_step.items() if count])


def place(config: TrainConfig, examples: Selection) -> tuple[Path, dict[str, Any]]:
    """The folder of a recipe's store, and what its rows follow from.

    That is the content of the model's files, the tokens of the examples, contexts included, the
    dtypes of weights and compute, and whether the store keeps a head: that of a frozen teacher, or
    the student's if it trains. Of best ids: their number, and what the teacher does to the output
    of its head, for which the student counts if its head is smaller. The model's files are read to
    the end for it.

    Args:
        config: the recipe.
        examples: of the roles that it trains.

    Raises:
        UserError: the folder of the model is missing.
    """
    model, frozen = teacher_model.settings(config), config.teacher.kind == "frozen"
    trains = model.adapter is None and not frozen
    made_of = {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "model": file_checksums(model.path),
        "examples": examples.digest,
        "weights": "float32" if trains else model.dtype,
        "compute": model.dtype,
        "head": (trains or frozen) and config.teacher.cache != "topk",
    }
    if config.teacher.cache == "topk":
        transform = teacher_model.transforms_of_configs(config)[1]
        made_of |= {"topk": config.teacher.topk, "transform": transform.pack()}
    key = sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    return (config.teacher.cache_folder or user_cache() / "teacher") / key, made_of


def _look(
    config: TrainConfig, examples: Selection, world: World, *, thorough: bool
) -> tuple[Path, dict[str, Any], str | None]:
    """What :func:`place` says, and what is wrong with the store there; as the first rank sees it.

    It reads the model's files and the store's to the end, and all ranks must do the same then.
    """
    found = None
    if world.first:
        folder, made_of = place(config, examples)
        found = folder, made_of, problem_of(folder, made_of, thorough=thorough)
    found = world.share(found)
    assert found is not None
    return found


def _build(
    config: TrainConfig,
    load: Callable[[], nn.Module],
    examples: Selection,
    folder: Path,
    made_of: dict[str, Any],
    world: World,
) -> None:
    """Make a store, in place of a damaged one."""
    say(f"running the teacher once, into {folder}")
    if world.first and folder.exists():
        shutil.rmtree(folder)
    start = time.perf_counter()
    model = load()
    with autocast(teacher_model.settings(config), model):
        build_rows(model, examples, folder, made_of, world, form=_form(config))
    say(f"wrote {folder} in {time.perf_counter() - start:.1f} s")


def _form(config: TrainConfig) -> Form:
    """What the store of a recipe keeps of each answer token."""
    if config.teacher.cache == "topk":
        return Best(config.teacher.topk, teacher_model.transforms_of_configs(config)[1])
    return Hidden(own_head=config.teacher.kind == "frozen")

"""Finding the store of a recipe's teacher, and making it where there is none.

A store lies under a key: a hash of all that its rows follow from. So runs share it as long as
model, examples and contexts are the same, whatever a recipe says of losses, steps or ranks of
adapters.
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
import torch.distributed as dist
import transformers
from torch import nn

from bidistill import teacher_model
from bidistill.config import TrainConfig
from bidistill.data.build import build_store
from bidistill.data.store import Selection, TokenStore
from bidistill.errors import UserError
from bidistill.files import file_sha256, user_cache
from bidistill.models import autocast, load_model, load_tokenizer, model_folder
from bidistill.progress import say
from bidistill.teacher import contexts_of
from bidistill.teacher_build import build_rows
from bidistill.teacher_store import FORMAT, TeacherStore, problem_of
from bidistill.world import device


def main(config: TrainConfig, *, check: bool = False) -> Path:
    """Make the store of a recipe unless it is there; say where it lies and what it takes.

    A store that is there is compared with its checksums, and made again where it is damaged.

    Args:
        config: the recipe; ``teacher.cache`` need not be ``disk``.
        check: compare only.

    Returns:
        The folder of the store.

    Raises:
        UserError: something in the recipe or the files it names cannot be used; with ``check``,
            also that the store is missing or damaged.
    """
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"teacher-cache: got {ranks} ranks, expected one; run it without torchrun, or let "
            "bidistill train make the store on all of them"
        )
    kept = replace(config.teacher, cache="disk")
    teacher_model.check(replace(config, teacher=kept))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(config.model.path)
    teacher_model.check_vocabulary(config, tokenizer)
    tokens = build_store(
        config.data.train,
        tokenizer,
        contexts_of(config.teacher),
        max_answer_tokens=config.data.max_answer_tokens,
        folder=config.data.cache,
        workers=config.data.workers,
    )
    examples = selected(config, tokens)
    folder, made_of = place(config, examples)
    problem = problem_of(folder, made_of, thorough=True)
    if problem and check:
        raise UserError(f"{problem}; run bidistill teacher-cache without --check to make it again")
    if problem:
        _build(config, lambda: _load(config), examples, folder, made_of)
    else:
        say(f"{folder}: whole, all checksums are right")
    store = TeacherStore(folder, verify=False)
    say(f"{store.tokens} answer tokens, {store.bytes_per_token} bytes each")
    if config.teacher.cache != "disk" and not check:
        say("bidistill train uses it with teacher.cache=disk")
    return folder


def _load(config: TrainConfig) -> nn.Module:
    """The teacher's model, whole."""
    if config.teacher.kind == "frozen":
        return teacher_model.load(config)
    return load_model(config.model, config.seed)


def rows_on_disk(
    config: TrainConfig, load: Callable[[], nn.Module], tokens: TokenStore
) -> TeacherStore:
    """Open the store of a recipe; make it if it is not there or damaged.

    What is found is checked by sizes and headers; set the environment variable
    ``BIDISTILL_VERIFY=1`` to compare checksums. Where ``torch.distributed`` is set up, all its
    ranks come here together, make the store together, and rank 0 does the checking.

    Args:
        config: the recipe.
        load: gives the teacher's model, untrained and whole; called if the store is to be made.
        tokens: all examples of the recipe.

    Raises:
        UserError: the folder cannot be written.
    """
    examples = selected(config, tokens)
    folder, made_of = place(config, examples)
    whole: list[Any] = [None]
    if _is_first():
        thorough = os.environ.get("BIDISTILL_VERIFY") == "1"
        whole[0] = problem_of(folder, made_of, thorough=thorough) is None
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(whole, src=0)  # all must do the same
    if not whole[0]:
        _build(config, load, examples, folder, made_of)
    return TeacherStore(folder, device=device(), verify=False)


def selected(config: TrainConfig, tokens: TokenStore) -> Selection:
    """The examples of the roles that a recipe trains."""
    return Selection(tokens, [role for role, count in config.data.per_step.items() if count])


def place(config: TrainConfig, examples: Selection) -> tuple[Path, dict[str, Any]]:
    """The folder of a recipe's store, and what its rows follow from.

    That is the content of the model's files, the tokens of the examples, contexts included, the
    dtypes of weights and compute, and whether the store keeps a head: that of a frozen teacher, or
    the student's if it trains. The model's files are read to the end for it.

    Args:
        config: the recipe.
        examples: of the roles that it trains.

    Raises:
        UserError: the folder of the model is missing.
    """
    model, frozen = teacher_model.settings(config), config.teacher.kind == "frozen"
    folder = model_folder(model.path)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    trains = model.adapter is None and not frozen
    made_of = {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "model": {path.name: file_sha256(path) for path in files},
        "examples": examples.digest,
        "weights": "float32" if trains else model.dtype,
        "compute": model.dtype,
        "head": trains or frozen,
    }
    key = sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
    return (config.teacher.cache_folder or user_cache() / "teacher") / key, made_of


def _build(
    config: TrainConfig,
    load: Callable[[], nn.Module],
    examples: Selection,
    folder: Path,
    made_of: dict[str, Any],
) -> None:
    """Make a store, in place of a damaged one, and say so on rank 0."""
    if _is_first():
        say(f"running the teacher once, into {folder}")
        if folder.exists():
            shutil.rmtree(folder)
    start = time.perf_counter()
    model = load()
    with autocast(teacher_model.settings(config), model):
        own = config.teacher.kind == "frozen"
        build_rows(model, examples, folder, made_of, own_head=own)
    if _is_first():
        say(f"wrote {folder} in {time.perf_counter() - start:.1f} s")


def _is_first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

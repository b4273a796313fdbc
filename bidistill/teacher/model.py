"""The model that a teacher's rows come from, and whether it fits the student.

It is the student itself, but for a frozen teacher, which is a model of its own: the same one in
another dtype, or another one with the student's vocabulary. Its width may differ, and so may what
it does to the output of its head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from bidistill import options
from bidistill.config import ModelConfig, TrainConfig
from bidistill.distributed import put_back
from bidistill.errors import UserError
from bidistill.loading import load_shared, load_tokenizer, model_folder, settings_of
from bidistill.losses import find
from bidistill.models import read_logit_transform, transform_of_config
from bidistill.objectives import check_options, needs_teacher
from bidistill.world import World
from bidistill_kernels import LogitTransform


def check(config: TrainConfig) -> None:
    """Refuse what a kind of teacher cannot do, and options that it or the student cannot have.

    Raises:
        UserError: an option for speed cannot be had; rows are to be kept that change with the
            student, or would be lost if they were not kept; a folder or a dtype is given for a
            teacher that has no weights of its own; or a loss needs more than is kept of the rows,
            or has options that it does not take.
    """
    teacher, own = config.teacher, settings(config)
    options.check(config.model, model_folder(config.model.path))
    with named_teachers_path(config):
        options.check(own, model_folder(own.path))
    if teacher.kind in ("live", "ema") and teacher.cache != "off":
        raise UserError(
            f"teacher.cache: got {teacher.cache} with teacher.kind {teacher.kind}, whose rows "
            "change with every step, expected off; set teacher.cache to off"
        )
    gone = teacher.kind == "base" and config.model.adapter is None and teacher.cache == "off"
    if gone and needs_teacher(config.objectives):
        raise UserError(
            "teacher.cache: got off while all weights train, expected memory, disk or topk; the "
            "base model is gone after the first step, so keep its rows, or set teacher.kind to "
            "frozen"
        )
    for key in ("path", "dtype"):
        if teacher.kind != "frozen" and (value := getattr(teacher, key)) is not None:
            raise UserError(
                f"teacher.{key}: got {value} with teacher.kind {teacher.kind}, which has no "
                "weights of its own, expected none; leave it out, or set teacher.kind to frozen"
            )
    for role, objective in config.objectives.items() if teacher.cache == "topk" else ():
        if find(objective.loss).teacher and objective.loss != "topk_kl":
            raise UserError(
                f"objectives.{role}.loss: got {objective.loss} with teacher.cache topk, which "
                "keeps no hidden rows, expected topk_kl or a loss without a teacher; change the "
                "loss, or set teacher.cache to disk"
            )
        check_options(role, objective)  # k is a number from here on, or None
        if (k := objective.options.get("k")) is not None and k > teacher.topk:  # type: ignore
            raise UserError(
                f"objectives.{role}.options: k: got {k}, expected at most teacher.topk, "
                f"{teacher.topk}; change one of the two"
            )


def settings(config: TrainConfig) -> ModelConfig:
    """Folder and dtype of the teacher's model; those of the student, but for a frozen teacher."""
    teacher = config.teacher
    if teacher.kind != "frozen":
        return config.model
    return replace(
        config.model,
        path=teacher.path or config.model.path,
        dtype=teacher.dtype or config.model.dtype,
        adapter=None,
    )


def load(config: TrainConfig, world: World) -> nn.Module:
    """Load a frozen teacher, shared out among the ranks as the student is.

    Args:
        config: the recipe.
        world: the ranks; all must call it.

    Raises:
        UserError: the folder is missing or holds no model that can be used.
    """
    own = settings(config)
    with named_teachers_path(config):
        parallel = replace(config.parallel, recompute=False)  # there is no backward
        model = load_shared(own, parallel, world, frozen=True)
        read_logit_transform(model)  # refuses a model whose head it does not understand
    put_back(model)
    return model


def check_vocabulary(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a frozen teacher to which the student's token ids mean something else, or nothing.

    Args:
        config: the recipe.
        tokenizer: the student's.

    Raises:
        UserError: the folder is missing, its tokenizer gives a token another id, or one of the
            heads lacks ids.
    """
    own = settings(config)
    if own.path == config.model.path:
        return
    with named_teachers_path(config):
        found, expected = load_tokenizer(own.path).get_vocab(), tokenizer.get_vocab()
    if odd := sorted(found.items() ^ expected.items()):
        token = odd[0][0]
        raise UserError(
            f"teacher.path: got {own.path}, where token {token!r} has id {found.get(token)}, "
            f"expected {expected.get(token)} as in model.path; choose a teacher with the "
            "student's tokenizer"
        )
    (_, rows), (_, rows_of_other) = _heads(config)
    if min(rows, rows_of_other) < len(tokenizer):
        raise UserError(
            f"teacher.path: got heads of {rows} (model.path) and {rows_of_other} ids ({own.path}), "
            f"expected at least the tokenizer's {len(tokenizer)}; choose a teacher with the "
            "student's vocabulary"
        )


def transforms(config: TrainConfig, student: nn.Module) -> tuple[LogitTransform, LogitTransform]:
    """What student and teacher do to the output of their heads.

    Models of one tokenizer may pad their heads to different sizes: then both are cut to the smaller
    one, and what is left out are ids that no text has.

    Args:
        config: the recipe; a frozen teacher need not be loaded.
        student: the student; where it is shared out, all ranks call it.

    Raises:
        UserError: the student's head is not understood.
    """
    read_logit_transform(student)  # compares what the configuration says with what the model does
    put_back(student)
    return transforms_of_configs(config)


def transforms_of_configs(config: TrainConfig) -> tuple[LogitTransform, LogitTransform]:
    """The same, by the configurations of the models alone.

    Raises:
        UserError: a folder is missing.
    """
    (own, rows), (theirs, rows_of_other) = _heads(config)
    if rows == rows_of_other:
        return own, theirs
    common = min(rows, rows_of_other)
    return replace(own, vocab_limit=common), replace(theirs, vocab_limit=common)


def _heads(config: TrainConfig) -> tuple[tuple[LogitTransform, int], tuple[LogitTransform, int]]:
    """What student and teacher do to the output of their heads, and how many ids these have."""
    own = _head_of(config.model.path)
    if settings(config).path == config.model.path:
        return own, own
    with named_teachers_path(config):
        return own, _head_of(settings(config).path)


def _head_of(path: str) -> tuple[LogitTransform, int]:
    found = settings_of(path).get_text_config()
    transform = transform_of_config(found)
    return transform, min(found.vocab_size, transform.vocab_limit or found.vocab_size)


@contextmanager
def named_teachers_path(config: TrainConfig) -> Iterator[None]:
    """Name the right key where the folder of a frozen teacher cannot be used."""
    try:
        yield
    except UserError as error:
        if config.teacher.path is None:
            raise
        raise UserError(str(error).replace("model.path", "teacher.path", 1)) from None

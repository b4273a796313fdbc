"""Which models, losses and teachers go together; the others are refused before anything trains."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.integrations.adapters import check_adapters, check_base, check_regularisers
from bidistill.loss_names import checked
from bidistill.losses import LOSSES, find
from bidistill.models import runs_losses, unwrapped
from bidistill.objectives import check_loss_options

KINDS = ("auto", "base", "live")
"""Teachers that need no other model."""

LARGEST_PADDING, LARGEST_SHARE = 1024, 0.05
"""Rows that one LM head may have beyond another, and their share of the larger. Padding fills up a
multiple of 1024 at most: 128 rows for each of 8 tensor-parallel ranks."""

WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Data types of an LM head's weight."""

REFUSED = {
    "chameleon": "masks the logits of its image tokens",
}
"""Model types whose logits are another function of their head, and what they do."""


def check_model(model: nn.Module, name: str) -> None:
    """Refuse a model whose fused loss would not be that of its own logits.

    Args:
        model: of transformers, or the PeftModel around one.
        name: what the caller knows it by, for the message.

    Raises:
        UserError: one line that says what it is.
    """
    base: Any = unwrapped(model)
    if not isinstance(base, PreTrainedModel):
        raise UserError(
            f"{name}: got a {type(model).__name__}, expected a causal language model of "
            "transformers, or a PeftModel around one; attach before it is compiled or wrapped"
        )
    kind = base.config.model_type
    if base.config.is_encoder_decoder:
        raise _unfit(name, base, f"is an encoder-decoder ({kind})")
    if hasattr(base, "final_logits_bias"):
        raise _unfit(name, base, f"adds a final_logits_bias to its logits ({kind})")
    if kind in REFUSED:
        raise _unfit(name, base, f"{REFUSED[kind]} ({kind})")
    if base.get_output_embeddings() is None:
        raise _unfit(name, base, f"has no LM head ({kind})")
    if getattr(base.config, "output_router_logits", False):
        raise UserError(
            f"{name}: got a {type(base).__name__} with output_router_logits, whose auxiliary loss "
            "would be left out, expected one without; set model.config.output_router_logits = False"
        )
    check_adapters(model, name)
    _check_head(base.get_output_embeddings(), name)  # type: ignore


def check_adapted(model: nn.Module, teacher: object) -> None:
    """Refuse what adapters that came since it was attached have made of a student.

    Args:
        model: the student.
        teacher: one of `KINDS`, or a model.

    Raises:
        UserError: one line that says what is wrong with them.
    """
    check_adapters(model, "model")
    check_regularisers(model)
    _check_head(model.get_output_embeddings(), "model")  # type: ignore
    if isinstance(teacher, str) and teacher != "live":
        check_base(model, teacher)


def _unfit(name: str, base: PreTrainedModel, why: str) -> UserError:
    return UserError(
        f"{name}: got a {type(base).__name__}, which {why}, expected a causal language model whose "
        "logits are those of its LM head; train it with its own loss"
    )


def _check_head(head: nn.Module, name: str) -> None:
    """Refuse a head that is no matrix product, or has a forward of its own."""
    parts: list[Any] = [head]
    if isinstance(head, ModulesToSaveWrapper):
        parts = [head.original_module, *head.modules_to_save.values()]
    elif isinstance(head, LoraLinear):
        plain = not head.lora_variant and not any(head.lora_bias.values())
        parts = [head.get_base_layer()] if plain else [head]
    for part in parts:
        # those of 8 bits are floating-point numbers too, and nothing without their scales
        if not isinstance(part, nn.Linear) or part.weight.dtype not in WEIGHTS:
            raise UserError(
                f"{name}: got a {type(head).__name__} as LM head, expected a linear layer of "
                "weights that are not quantised, with a plain LoRA or without; leave it out of "
                "quantisation and of other adapters"
            )
    if "forward" in vars(head) and not runs_losses(head):
        raise UserError(
            f"{name}: got an LM head whose forward somebody has replaced, expected its own; "
            "undo that, or load the model without device_map"
        )


def check_loss(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a loss that no teacher's head takes part in, and options that it has not.

    Args:
        name: of the loss.
        options: its own, by name.

    Raises:
        UserError: one line that says what would do.
    """
    fit = ", ".join(n for n, loss in LOSSES.items() if loss.reads == "head" and loss.teacher)
    try:
        found = find(checked(name))
    except ValueError as error:
        raise UserError(f"loss: got {name!r}, expected {error}") from None
    if found.reads != "head" or not found.teacher:
        raise UserError(
            f"loss: got {name!r}, which does not compare LM heads with a teacher's, expected one "
            f"that does; use one of: {fit}"
        )
    check_loss_options("options", name, options)


def check_padding(own: int, teachers: int) -> None:
    """Refuse two vocabularies that are no two paddings of one.

    Args:
        own: rows of the student's LM head.
        teachers: rows of the teacher's.

    Raises:
        UserError: they are too far apart.
    """
    beyond = abs(own - teachers)
    if beyond >= LARGEST_PADDING or beyond > LARGEST_SHARE * max(own, teachers):
        raise UserError(
            f"teacher: got an LM head of {teachers} rows for a student's of {own}, expected the "
            f"same tokenizer, whose heads differ by padding alone (less than {LARGEST_PADDING} "
            f"rows, at most {LARGEST_SHARE:.0%}); pass a teacher of the student's tokenizer"
        )


def check_teacher(teacher: object, model: nn.Module) -> Any:  # noqa: ANN401
    """Refuse a teacher that cannot be had.

    Args:
        teacher: one of `KINDS`, or a model.
        model: the student.

    Returns:
        The teacher.

    Raises:
        UserError: one line that says what would do.
    """
    if isinstance(teacher, nn.Module):
        check_model(teacher, "teacher")
        if unwrapped(teacher) is unwrapped(model):
            raise UserError(
                "teacher: got the model itself, expected another one; pass teacher='live', or "
                "'base' for it without its adapters"
            )
        return teacher
    if teacher not in KINDS:
        raise UserError(
            f"teacher: got {teacher!r}, expected one of {', '.join(map(repr, KINDS))} or a model"
        )
    if teacher != "live":
        check_base(model, teacher)
    return teacher

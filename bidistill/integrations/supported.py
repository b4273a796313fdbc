"""Which models, losses and teachers go together; the others are refused before anything trains."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.integrations.adapters import (
    check_adapters,
    check_base,
    check_merged,
    check_regularisers,
    has_adapters,
)
from bidistill.loss_names import checked
from bidistill.losses import LOSSES, find
from bidistill.models import runs_losses, unwrapped
from bidistill.objectives import check_loss_options

Kind = Literal["auto", "base", "live"]
KINDS = get_args(Kind)
"""Teachers that need no other model."""

LARGEST_PADDING, LARGEST_SHARE = 1024, 0.05
"""Rows that one LM head may have beyond another, and their share of the larger. Padding fills up a
multiple of 1024 at most: 128 rows for each of 8 tensor-parallel ranks."""

WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Data types of an LM head's weight."""

SHARDING = ("torch.distributed.", "deepspeed.")
"""Packages whose hooks make a weight whole and leave what a forward is given and returns."""

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
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"{name}: got a {type(model).__name__} with parameters on the meta device, expected "
            "all of its weights; load them before attach()"
        )


def check_unchanged(model: nn.Module, name: str) -> None:
    """Refuse what may be done to a model at any time after it was attached.

    Args:
        model: student or teacher.
        name: what the caller knows it by, for the message.

    Raises:
        UserError: its adapters are merged, or a hook stands at its LM head.
    """
    check_merged(model, name)
    _check_hooks(model.get_output_embeddings(), name)  # type: ignore


def check_adapted(model: nn.Module, teacher: object) -> None:
    """Refuse what adapters that came since it was attached have made of a student.

    Args:
        model: the student.
        teacher: ``"base"``, ``"live"`` or a model.

    Raises:
        UserError: one line that says what is wrong with them.
    """
    check_adapters(model, "model")
    check_regularisers(model)
    _check_head(model.get_output_embeddings(), "model")  # type: ignore
    if teacher == "base":
        check_base(model, "base")


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
        found = [type(variant).__name__ for variant in head.lora_variant.values()]
        found += ["lora_bias"] * any(head.lora_bias.values())
        if found:
            raise UserError(
                f"{name}: got a LoRA with {found[0]} on the LM head, expected a plain one; leave "
                "the head out of its target_modules, or make it plain"
            )
        parts = [head.get_base_layer()]
    elif isinstance(head, BaseTunerLayer):
        raise UserError(
            f"{name}: got a {type(head).__module__}.{type(head).__name__} on the LM head, expected "
            "a plain LoRA or no adapter; leave the head out of its target_modules"
        )
    for part in parts:
        if not isinstance(part, nn.Linear):
            raise UserError(
                f"{name}: got a {type(part).__name__} as LM head, expected an nn.Linear whose "
                "weights are not quantised; leave it out of quantisation"
            )
        # those of 8 bits are floating-point numbers too, and nothing without their scales
        if part.weight.dtype not in WEIGHTS:
            raise UserError(
                f"{name}: got a {type(part).__name__} as LM head, expected weights that are not "
                f"quantised and no {part.weight.dtype}; leave it out of quantisation"
            )
    if "forward" in vars(head) and not runs_losses(head):
        raise UserError(
            f"{name}: got an LM head whose forward somebody has replaced, expected its own; "
            "undo that, or load the model without device_map"
        )
    _check_hooks(head, name)


def _check_hooks(head: nn.Module, name: str) -> None:
    """Refuse hooks that want logits, of which there are none; the head returns a loss instead."""
    for hook in (*head._forward_pre_hooks.values(), *head._forward_hooks.values()):
        known: Any = getattr(hook, "func", hook)  # of a partial
        if not str(getattr(known, "__module__", "")).startswith(SHARDING):
            raise UserError(
                f"{name}: got an LM head with a forward hook "
                f"({getattr(known, '__qualname__', type(known).__name__)}), which would be given "
                "the loss and not logits, expected none; remove the hook"
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
    if not isinstance(name, str):
        raise UserError(f"loss: got {name!r}, expected the name of a loss; use one of: {fit}")
    if not isinstance(options, Mapping):
        raise UserError(
            f"options: got {options!r}, expected the loss's options by name; pass a dictionary"
        )
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


def check_numbers(temperature: Any, chunk_bytes: Any) -> None:  # noqa: ANN401
    """Refuse numbers that the kernels would refuse at the first batch, or that are none.

    Args:
        temperature: divisor of logits.
        chunk_bytes: of logits at a time; None: the kernels' own choice.

    Raises:
        UserError: one line that says which.
    """
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise UserError(
            f"temperature: got {temperature!r}, expected a finite number above 0; 1.0 leaves "
            "logits as they are"
        )
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise UserError(
            f"chunk_bytes: got {chunk_bytes!r}, expected a whole number of bytes above 0; pass "
            "None for the kernels' own choice"
        )


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
        The teacher; for ``"auto"`` the one that it stands for.

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
    if not isinstance(teacher, str) or teacher not in KINDS:
        raise UserError(
            f"teacher: got {teacher!r}, expected one of {', '.join(map(repr, KINDS))} or a model"
        )
    if teacher != "live":
        check_base(model, teacher)
    if teacher == "auto":
        return "base" if has_adapters(model) else "live"
    return teacher

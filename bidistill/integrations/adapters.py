"""Which adapters the fused losses understand, and when they hide an untouched base model."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from bidistill.errors import UserError

REFUSED = {
    "LILY": "mixes by the mean over all tokens of a batch, later ones and padding included",
}
"""Types of adapters whose layers do not keep tokens apart, and what they do."""

REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the name of an initialisation of LoRA begins that changes the weights below the adapter."""


def has_adapters(model: nn.Module) -> bool:
    """Whether there are layers of adapters in ``model``, whoever added them."""
    return any(isinstance(m, BaseTunerLayer | ModulesToSaveWrapper) for m in model.modules())


def check_adapters(model: nn.Module, name: str) -> None:
    """Refuse adapters that are not layers of the model, or cannot be switched off.

    Args:
        model: with adapters or without.
        name: what the caller knows it by, for the message.

    Raises:
        UserError: one line that says which.
    """
    for config in configs_of(model):
        if config.is_prompt_learning:
            raise UserError(
                f"{name}: got an adapter of {config.peft_type.value}, whose virtual tokens are "
                "added outside of the model, expected one of layers; use LoRA"
            )
        kind = config.peft_type.value
        if kind in REFUSED:
            raise UserError(
                f"{name}: got an adapter of {kind}, which {REFUSED[kind]}, expected one that acts "
                "on each token; use LoRA"
            )
        if _acts_outside(config):
            raise UserError(
                f"{name}: got an adapter of {kind}, a part of which runs around "
                "the model and not in its layers, expected one of layers alone; use LoRA"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UserError(
                f"{name}: got an activated LoRA, which changes with the prompt, expected an "
                "ordinary one; leave alora_invocation_tokens out"
            )
    check_merged(model, name)


def check_merged(model: nn.Module, name: str) -> None:
    """Refuse adapters that are in the weights, where the loss would count them twice.

    Args:
        model: with adapters or without.
        name: what the caller knows it by, for the message.

    Raises:
        UserError: some are merged.
    """
    if any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise UserError(
            f"{name}: got adapters that are merged into the weights, expected them beside; call "
            "unmerge_adapter() first"
        )


def check_regularisers(model: nn.Module) -> None:
    """Refuse adapters to be trained that add a term to the loss, outside of the model.

    Raises:
        UserError: AdaLoRA with its regulariser.
    """
    for config in configs_of(model):
        if weight := getattr(config, "orth_reg_weight", 0):
            raise UserError(
                f"model: got an {config.peft_type.value} adapter with orth_reg_weight={weight}, "
                "whose regulariser would be left out, expected none; set orth_reg_weight=0.0"
            )


def check_base(model: nn.Module, teacher: str) -> None:
    """Refuse "base" as the teacher where switching adapters off gives no constant base model.

    Args:
        model: the student.
        teacher: what the user has asked for, ``"base"`` or ``"auto"``.

    Raises:
        UserError: one line that says what else is trained.
    """
    got = f"teacher: got {teacher!r} for a model"
    instead = "pass teacher='live', or another model"
    configs = configs_of(model)
    if configs and not has_adapters(model):
        kinds = ", ".join(config.peft_type.value for config in configs)
        raise UserError(
            f"{got} with adapters of {kinds}, which are no layers to switch off, expected such as "
            f"LoRA; {instead}"
        )
    if not has_adapters(model):
        if teacher == "base":
            raise UserError(
                f"{got} without adapters, expected some to switch off; call get_peft_model first, "
                "or pass another model"
            )
        return
    for config in configs:
        if (bias := getattr(config, "bias", "none")) != "none":
            raise UserError(
                f"{got} whose adapter trains biases of the base model (bias={bias!r}), expected "
                f"bias='none'; {instead}"
            )
        if how := _rewriting(config):
            raise UserError(
                f"{got} whose adapter has changed the weights of the base model when it was made "
                f"({how}), expected one that leaves them; {instead}"
            )
    trained = _trained_of_base(model)
    if trained:
        raise UserError(
            f"{got} that trains {len(trained)} parameters beside its adapters, such as "
            f"{trained[0]}, expected adapters and modules_to_save alone; freeze them, or {instead}"
        )


def configs_of(model: nn.Module) -> list[Any]:
    """What peft was asked for, one for each adapter; on ``model`` or on what is around it."""
    found: Any = getattr(model, "peft_config", None) or {}
    return list(found.values())


def _acts_outside(config: Any) -> bool:  # noqa: ANN401
    """Whether such an adapter has a forward of its own around the model's: X-LoRA, Poly, Shadow.

    Fresh ones may change nothing yet, so that no number would tell. That of AdaLoRA adds a
    regulariser alone: see `check_regularisers`.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type, nn.Module)
    own = issubclass(tuner, BaseTuner) and tuner.forward is not BaseTuner.forward
    return own and config.peft_type.value != "ADALORA"


def _rewriting(config: Any) -> str:  # noqa: ANN401
    """What has left other weights below an adapter than the base model's; empty if nothing."""
    how = getattr(config, "init_lora_weights", True)
    if isinstance(how, str) and how.lower().startswith(REWRITING):
        return f"init_lora_weights={how!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) else ""


def _trained_of_base(model: nn.Module) -> list[str]:
    """Names of trained parameters that are there, too, with the adapters off."""
    switched = set[nn.Parameter]()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            below: nn.Module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            below = module.original_module
        else:
            continue
        switched |= set(module.parameters()) - set(below.parameters())  # type: ignore
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and p not in switched]

"""What makes a model faster if it is asked for: FlashAttention, and the kernels of liger-kernel.

Neither is needed, and results change by rounding alone. What is asked for and cannot be had is
refused before anything is loaded; nothing falls back in silence.
"""

import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from bidistill import flash
from bidistill.config import ModelConfig
from bidistill.errors import UserError
from bidistill.models import unwrapped


def check(config: ModelConfig, folder: Path) -> None:
    """Refuse options that this machine or this model cannot have; reads only the config.json.

    Args:
        config: of the recipe.
        folder: with the model.

    Raises:
        UserError: what is missing, what to install, and what else to do.
    """
    if config.attention == "flash":
        flash.check_flash(config.dtype)
    if config.liger:
        _check_liger(folder)


def apply(model: nn.Module, config: ModelConfig) -> None:
    """Put the options of a recipe into effect; weights and their names stay as they are.

    Args:
        model: with an adapter or without, on any device or none, not yet shared out among ranks.
        config: what :func:`check` let pass.
    """
    if config.attention == "flash":
        flash.choose_flash(model)
    if config.liger:
        apply_liger(model)


def apply_liger(model: nn.Module) -> None:
    """Let norms, rotary angles and gated layers of ``model`` run by Liger's Triton kernels.

    Liger also replaces functions and classes in transformers' module: other models of this kind in
    the same process turn by its rotary angles, and those made later are its own. Its losses and
    its forward of the whole model are left out, for our losses read the head as it is.
    """
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )

    # the rest by Liger's own defaults, which differ with the kind of model
    _apply_liger_kernel_to_instance(
        model=unwrapped(model), cross_entropy=False, fused_linear_cross_entropy=False
    )


def _check_liger(folder: Path) -> None:
    """Refuse Liger's kernels without the package, a CUDA device, or kernels for this model."""
    instead = "or leave model.liger out: results are the same, up to rounding"
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "model.liger: got true, but liger-kernel is not installed; pip install liger-kernel, "
            f"{instead}"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "model.liger: got true without a CUDA device, expected one, for these are Triton "
            f"kernels; train where there is one, {instead}"
        )
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"model.liger: got true for a {kind} model, which this liger-kernel has no kernels "
            f"for; update it, {instead}"
        )

"""Results in the formats that others load: a PEFT adapter, or a whole transformers model."""

import copy
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from bidistill.files import atomic_path
from bidistill.models import unwrapped


def weaken(model: PeftModel, strength: float) -> None:
    """Let the adapters of ``model`` add only the share ``strength`` of their change from now on.

    Training overshoots: it goes on after the last forget answer has turned, and side effects grow
    with the change. PEFT keeps the factor as ``lora_alpha``, so a saved adapter has it too.
    """
    for config in model.peft_config.values():
        config.lora_alpha *= strength  # type: ignore
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: scale * strength for name, scale in module.scaling.items()}


def save_adapter(model: PeftModel, folder: Path | str) -> Path:
    """Write the adapter alone, for ``PeftModel.from_pretrained``; replaces an older one.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    _remove(folder)
    with atomic_path(folder) as temporary:
        # the embeddings never train beside an adapter; "auto" would ask a hub about them
        model.save_pretrained(str(temporary), save_embedding_layers=False)
    return folder


def save_merged(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a whole model with any adapter merged in, for ``AutoModelForCausalLM``.

    Weights are merged in fp32. The model itself stays as it is; only the tensors of the result
    are held beside it. A head with an adapter is no longer tied to the embedding: it is written
    beside it.

    Args:
        model: the trained model, with an adapter or without.
        tokenizer: written beside it.
        folder: where to write; an older result is replaced.
        dtype: of the stored weights; None takes that of the files the model came from. bf16
            rounds a change that is small beside the weight: answers near a tie may differ.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    _remove(folder)
    dtype = dtype or _stored_dtype(model)
    config = copy.deepcopy(unwrapped(model).config)
    if isinstance(model.get_output_embeddings(), LoraLayer):  # type: ignore
        config.tie_word_embeddings = False
    # a shell without memory of its own takes the merged tensors: save_pretrained then drops
    # tied weights and writes the right dtype into config.json
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shell.load_state_dict(_merged_state(model, dtype), strict=False, assign=True)
    shell.tie_weights()
    shell.generation_config = unwrapped(model).generation_config
    with atomic_path(folder) as temporary:
        shell.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _merged_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base model's state dict with each adapter's change added."""
    base = unwrapped(model)
    state = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor.to(dtype, copy=False)
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight.detach().float()  # type: ignore
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).detach()  # type: ignore
            state[f"{name}.weight"] = weight.to(dtype)
    return state


def _stored_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the files that the model was loaded from; its own if it was made in memory."""
    base = unwrapped(model)
    source = Path(base.config._name_or_path)
    if not (source / "config.json").is_file():
        return base.dtype
    stored = AutoConfig.from_pretrained(source, local_files_only=True).dtype
    return stored if isinstance(stored, torch.dtype) else base.dtype


def _remove(folder: Path) -> None:
    """A folder is replaced, not merged into: files of an older result must not stay."""
    if folder.exists():
        shutil.rmtree(folder)

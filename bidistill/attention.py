"""Attention over packed sequences with shared prefixes, registered with transformers.

Each segment of a pack attends to itself causally and to its prefix wholly, one call of PyTorch's
scaled_dot_product_attention a segment. No mask over the whole pack is ever built, so the cost grows
with the lengths of the segments and not with the square of the pack. On CUDA one call of PyTorch's
FlashAttention for sequences of varying length can do all segments, if it is asked for.

Legend: B rows of the batch (always 1), N heads of the queries, M heads of keys and values (N is a
multiple of M), T tokens of the pack, D width of a head.

What was tried (one CPU thread, fp32, one layer with N 9, M 3, D 64, a prefix of 28 tokens and 26
segments of 14 to 30; forward and backward, best of 25): slicing keys and values for each segment
13.6 ms, because the gradient of every slice fills a tensor of T tokens; splitting once 8.9 ms;
splitting and repeating the key heads N/M times 11.1 ms; one call for all segments of one length
8.7 ms, not worth its code.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from bidistill.data.packing import Segment
from bidistill.errors import UserError

NAME = "bidistill_packed"
"""What a model's configuration calls this attention."""
FLASH_NAME = "bidistill_packed_varlen"
"""The same by FlashAttention. Not called flash: transformers takes all of that name for its own."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments by which models change the scores: softcap (gemma2), sinks (gpt-oss), a learned bias.
_REFUSED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make both attentions known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(FLASH_NAME, flash_attention)
    for name in (NAME, FLASH_NAME):
        AttentionMaskInterface.register(name, _no_mask)


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
            f"model.attention: got flash with model.dtype {dtype}, expected bfloat16; change that, "
            f"{instead}"
        )


def choose_flash(model: nn.Module) -> None:
    """Let :func:`use_packed_attention` take FlashAttention for ``model`` from now on."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._packed_attention = FLASH_NAME  # type: ignore


@contextmanager
def use_packed_attention(model: nn.Module) -> Iterator[None]:
    """Run a model's attention on packed sequences inside a `with` block, as before after it.

    Inside, call the model with ``input_ids``, ``position_ids`` and ``segments`` of a
    `bidistill.data.packing.Packed`, ``use_cache=False`` and no attention mask. Where layers are
    checkpointed, call ``backward`` inside too: it runs them again.

    Args:
        model: a transformers model, or one that PEFT or another wrapper holds.

    Raises:
        UserError: the model's layers are not all causal softmax attention that transformers lets
            others compute; packed sequences would leak into each other.

    Example::

        with use_packed_attention(model):
            hidden = model.base_model(
                input_ids=packed.input_ids, position_ids=packed.position_ids,
                segments=packed.segments, use_cache=False,
            ).last_hidden_state[0, packed.rows]
    """
    register()
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for inner in models:
        _check_model(inner)
    before = [(inner.config, inner.config._attn_implementation) for inner in models]
    try:
        for inner in models:
            inner.config._attn_implementation = getattr(inner, "_packed_attention", NAME)
        yield
    finally:
        for config, implementation in before:  # outer first: setting one also sets those inside it
            config._attn_implementation = implementation


def packed_attention(
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
    """Attend inside each segment and from it to its prefix; what transformers calls per layer.

    Args:
        module: the attention layer.
        q: queries.
        k: keys.
        v: values.
        attention_mask: None; the segments say who sees whom.
        scaling: factor on the scores. None: 1/sqrt(D).
        segments: a partition of the T tokens, in order, prefixes before what follows them.
        sliding_window: a token sees that many tokens, itself counted. None: all before it.
        dropout: share of the attention weights that is dropped.
        **kwargs: what else the model passes; score changes that are not supported are refused.

    Returns:
        The attention's output, and None for its weights, which are not kept.

    Raises:
        UserError: the model changes the scores in a way that is not supported.
        ValueError: segments are missing or do not cover the tokens, or a mask is given.
    """
    _check_call(module, q, k, attention_mask, segments, kwargs)
    sizes = [segment.end - segment.start for segment in segments]
    # splitting once makes the gradient one concatenation; a slice each would fill T tokens each
    parts = zip(segments, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
    attend = partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    outputs = []
    for segment, queries, keys, values in parts:
        first = 0
        if segment.prefix is None:
            seen[segment.start, segment.end] = keys, values
        else:
            prefix_keys, prefix_values = seen[segment.prefix]
            first = prefix_keys.shape[2]
            keys = torch.cat((prefix_keys, keys), 2)
            values = torch.cat((prefix_values, values), 2)
        mask = _mask(first, keys.shape[2], sliding_window, q.device)
        outputs.append(attend(queries, keys, values, attn_mask=mask, is_causal=mask is None))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


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
    """:func:`packed_attention` in one call of PyTorch's FlashAttention.

    Keys and values of a prefix are laid down anew before those of each segment that sees it;
    FlashAttention aligns the last query with the last key, which is what a prefix needs.

    Raises:
        UserError: the model changes the scores in a way that is not supported, or drops weights.
        ValueError: segments are missing or do not cover the tokens, or a mask is given.
    """
    _check_call(module, q, k, attention_mask, segments, kwargs)
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


def _mask(
    first: int, end: int, window: int | None, device: torch.device
) -> Bool[Tensor, "Q K"] | None:
    """Who sees whom for queries first..end-1 and keys 0..end-1; None if that is plainly causal."""
    if window is not None and window >= end:
        window = None
    if first == 0 and window is None:
        return None
    size = 1 << (end - 1).bit_length()  # powers of two: few masks serve all lengths
    return _square_mask(size, window, device)[first:end, :end]


@lru_cache(maxsize=16)
def _square_mask(size: int, window: int | None, device: torch.device) -> Bool[Tensor, "K K"]:
    """True where the query of a row sees the key of a column."""
    mask = torch.ones(size, size, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def _check_model(model: PreTrainedModel) -> None:
    """Refuse layers that would mix packed sequences without a word."""
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UserError(
            f"model: got {name}, whose attention cannot be replaced, expected one that uses "
            "transformers' attention interface; use another model"
        )
    other = set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise UserError(
            f"model: got {name} with layers of type {', '.join(sorted(other))}, expected only "
            f"{' and '.join(sorted(_LAYER_TYPES))}; use another model"
        )


def _check_call(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[Segment, ...],
    kwargs: dict[str, object],
) -> None:
    """Refuse what would give wrong numbers."""
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if not getattr(module, "is_causal", True):
        refused.append("is_causal=False")
    if refused:
        raise UserError(
            f"model: got attention with {', '.join(refused)}, expected plain causal softmax "
            "attention; packed sequences do not support it, use another model"
        )
    if not segments:
        raise ValueError(
            "segments: got none, expected the segments of the pack; call the model with "
            "segments=packed.segments inside use_packed_attention only"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask: got one, expected None; the segments replace it")
    if (q.shape[0], q.shape[2], k.shape[2]) != (1, segments[-1].end, segments[-1].end):
        raise ValueError(
            f"segments: got {segments[-1].end} tokens for queries {tuple(q.shape)} and keys "
            f"{tuple(k.shape)}, expected one sequence of that length; pass the segments of this "
            "pack, and use_cache=False"
        )


def _no_mask(*args: object, **kwargs: object) -> None:
    """Stands where other attentions build a mask over all tokens."""

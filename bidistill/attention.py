"""Attention over packed sequences with shared prefixes, registered with transformers.

Each segment of a pack attends to itself causally and to its prefix wholly, one call of PyTorch's
scaled_dot_product_attention a segment. No mask over the whole pack is ever built, so the cost grows
with the lengths of the segments and not with the square of the pack. flash.py does all segments in
one call, where it can.

Legend: B rows of the batch (always 1), N heads of the queries, M heads of keys and values (N is a
multiple of M), T tokens of the pack, D width of a head.

What was tried (one CPU thread, fp32, one layer with N 9, M 3, D 64, a prefix of 28 tokens and 26
segments of 14 to 30; forward and backward, best of 25): slicing keys and values for each segment
13.6 ms, because the gradient of every slice fills a tensor of T tokens; splitting once 8.9 ms;
splitting and repeating the key heads N/M times 11.1 ms; one call for all segments of one length
8.7 ms, not worth its code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

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

_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments by which models change the scores: softcap (gemma2), sinks (gpt-oss), a learned bias.
_REFUSED = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make the attention known to transformers as `NAME`; calling it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, no_mask)


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
    check_call(module, q, k, attention_mask, segments, kwargs)
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


def check_call(
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


def no_mask(*args: object, **kwargs: object) -> None:
    """Stands where other attentions build a mask over all tokens."""

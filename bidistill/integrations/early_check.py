"""Before anything trains: a few tokens along the very way that the loss will take.

The loss runs the model without its head, and reads the head's weight: whatever a model does around
these two, or whatever is done to it from outside, is left out of the loss and of its gradients. So
the logits of that way, in a batch, are compared with the model's own of one sequence alone, and
those of a token with what they are when the tokens after it are others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bidistill.distributed import put_back
from bidistill.errors import UserError
from bidistill.integrations.attached import reads_positions, with_targets
from bidistill.models import (
    ROOT_METHODS,
    TRANSFORM_TOLERANCE,
    attach_distill_step,
    attach_head,
    compute_device,
    own_rows,
    read_logit_transform,
    runs_losses,
    unwrapped,
    without_dropout,
)
from bidistill_kernels import LogitTransform

TOKENS = 16
"""Of each sequence that is run."""
ROUNDINGS = 4
"""Units in the last place that the largest logit may differ by, in 16 bits."""
EXPERTS = 0.25
"""Share of what other tokens before it change in a logit that it may differ by, in 16 bits: there,
a rounding may send a token to another expert. Reading ahead changes about as much as they do."""


@torch.no_grad()
def checked_transform(model: nn.Module, name: str) -> LogitTransform:
    """What a model does to the output of its head, once its loss is known to be that of its logits.

    Args:
        model: called a few times on 16 random tokens, without dropout; left as it was.
        name: what the caller knows it by, for the message.

    Returns:
        Scale, soft-cap and vocabulary limit.

    Raises:
        UserError: the logits are others along the way of the loss, or depend on later tokens
            or on the other sequences of a batch.
    """
    with without_dropout(model), _running_losses(model):
        transform = read_logit_transform(model, name)
        ids = unwrapped(model).config.get_text_config().vocab_size
        generator = torch.Generator("cpu").manual_seed(1)
        drawn = torch.randint(ids, (2, TOKENS), generator=generator, device="cpu")
        drawn = drawn.to(compute_device(model))
        half, tokens = TOKENS // 2, drawn[:1]
        ends = torch.cat((drawn[:1, :half], drawn[1:, half:]), 1)
        begins = torch.cat((drawn[1:, :half], drawn[:1, half:]), 1)
        # before the model's own forward, so that there is nothing of these tokens to be found; and
        # as one batch, so that a mixing of its sequences shows beside one alone
        ours, ended, begun = _logits(model, transform, torch.cat((tokens, ends, begins)))
        own = model(input_ids=tokens, use_cache=False).logits[0]
    kind = unwrapped(model).config.model_type
    largest = own.abs().max().item()
    limit = _limit(model, largest, _distance(begun[half:], ours[half:]))
    if not (error := _distance(ours, own)) <= limit:
        raise UserError(
            f"{name}: the logits of this {kind} model differ by {error:.3g} from those of its "
            f"backbone and LM head alone, in a batch of others (largest logit {largest:.3g}), "
            "expected the same; attach before accelerator.prepare, take off what changes it from "
            "outside or mixes the batch, or train it with its own loss"
        )
    if not (error := _distance(ended[:half], ours[:half])) <= limit:
        raise UserError(
            f"{name}: the logits of this {kind} model change by {error:.3g} with the tokens that "
            f"come later (largest logit {largest:.3g}), expected an autoregressive model; train it "
            "with its own loss"
        )
    return transform


def _logits(model: nn.Module, transform: LogitTransform, tokens: Tensor) -> Tensor:
    """What the loss would take for the logits of a batch of sequences, shape (B, T, V)."""
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    padded = with_targets(inputs, "", tokens.shape[1], reads_positions(model))
    # where a model is shared out, its method is what may run it, and its head whole but inside
    run = vars(model).get("own_rows") or partial(own_rows, model)
    logits = run(padded, head=True, read=lambda *head: transform(F.linear(*head)))
    return logits.unflatten(0, tokens.shape)


def _distance(one: Tensor, other: Tensor) -> float:
    """Between two of the same shape, the largest of all entries."""
    return (one - other).abs().max().item()


def _limit(model: nn.Module, largest: float, ahead: float) -> float:
    """How far apart two logits may be that are the same but for rounding.

    Args:
        model: whose weights say how logits are rounded.
        largest: of all logits.
        ahead: how far tokens change logits that come after them.
    """
    known = torch.finfo(model.get_output_embeddings().weight.dtype)  # type: ignore
    if known.bits > 16:
        return TRANSFORM_TOLERANCE * largest
    return max(ROUNDINGS * known.eps * largest, EXPERTS * ahead)


@contextmanager
def _running_losses(model: nn.Module) -> Iterator[None]:
    """The LM head able to run losses inside, what is shared out too, and then as it was."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore
    before, methods = runs_losses(head), set(ROOT_METHODS) - set(vars(model))
    attach_head(model)
    if isinstance(model, FSDPModule) and methods:
        attach_distill_step(model)
    try:
        yield
    finally:
        put_back(model)
        for method in methods:
            vars(model).pop(method, None)
        if not before:
            del head.forward

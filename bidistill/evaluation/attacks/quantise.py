"""Quantisation: rounding the weights may round the forgetting away.

The weights of the linear layers go through int8 or int4 and back, in place; the model computes in
its own precision with what came back, as it would with weights that were stored so. The LM head
and the embedding stay, as common quantisers leave them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bidistill.evaluation.attacks.ask import ask
from bidistill.evaluation.attacks.attempt import UNTOUCHED, Attempt, Item, Setting
from bidistill.evaluation.attacks.count import rates
from bidistill.evaluation.attacks.low_rank import linear_layers


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a weight can have: ±(2^(bits-1) - 1) steps, a step for each group."""

    bits: int
    group: int | None
    """Weights of a row, one after another, that share a step; None for the whole row."""


GRIDS = {"int8": Grid(8, None), "int4": Grid(4, 64)}


def quantise(model: PreTrainedModel, setting: Setting) -> tuple[dict[str, Any], list[Item]]:
    """Ask the plain questions of the model as it is, and on each of `GRIDS`.

    Returns:
        Rates, with ``leak`` the share that leaks on any grid; ``by`` holds each of them, and
        ``delta`` how much more each leaks than the untouched model. And the items.
    """
    items = _ask(model, setting, UNTOUCHED)
    for name, grid in GRIDS.items():
        with quantised(model, grid):
            items += _ask(model, setting, name)
    summary = rates(items)
    leak = {name: rate["leak"] for name, rate in summary["by"].items()}
    before = leak[UNTOUCHED]
    summary["delta"] = {name: None if before is None else leak[name] - before for name in GRIDS}
    return summary, items


@contextmanager
def quantised(model: PreTrainedModel, grid: Grid) -> Iterator[None]:
    """Within the context the linear layers' weights are rounded; then they are what they were.

    Copies of them wait in the memory of the host.
    """
    weights = [layer.weight for layer in linear_layers(model)]
    kept = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(rounded(weight, grid))
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, kept, strict=True):
                weight.copy_(values)


def rounded(weight: Tensor, grid: Grid) -> Tensor:
    """Round to the nearest value of a symmetric grid that reaches to the largest of each group.

    Args:
        weight: shape (out, in); not modified.
        grid: bits, and how many weights of a row share a step.

    Returns:
        The same shape, fp32. No value moves by more than half a step, max |group| / (2^bits - 2).

    Example:
        >>> rounded(torch.tensor([[1.0, 0.3, -0.2, 0.0]]), Grid(2, 2)).tolist()
        [[1.0, 0.0, -0.20000000298023224, 0.0]]
    """
    groups = weight.float().split(grid.group or weight.shape[1], dim=1)
    return torch.cat([_rounded_group(group, 2 ** (grid.bits - 1) - 1) for group in groups], dim=1)


def _rounded_group(group: Tensor, most: int) -> Tensor:
    """One step for each row."""
    step = group.abs().amax(dim=1, keepdim=True) / most
    # a group of zeros has no step
    return torch.where(step > 0, (group / step).round() * step, group)


def _ask(model: PreTrainedModel, setting: Setting, name: str) -> list[Item]:
    """The plain questions, as they are answered now."""
    attempts = [
        Attempt(attack="quantise", attempt=name, probe=p, question=p.question)
        for p in setting.forget
    ]
    return ask(model, setting, attempts)

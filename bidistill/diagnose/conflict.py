"""How the gradients of the roles lie to each other: at one point of training, and over all.

Legend: K roles, M measurements.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from bidistill.data.records import Role
from bidistill.diagnose.report import pair_name
from bidistill.diagnose.transfer import LossesOf, transfer
from bidistill.gradients import cosines, gram, role_gradients


@dataclass(frozen=True, slots=True)
class Measurement:
    """How the roles' gradients lie to each other at one point of training."""

    step: int
    """Updates done before."""
    losses: Mapping[Role, float]
    """Weighted and divided by the rows of the step, as they enter its loss; nats."""
    norms: Mapping[Role, float]
    cosines: Float64[Tensor, "K K"]
    """NaN where a gradient is negligible."""
    transfer: Float64[Tensor, "K K"]
    """NaN where it could not be measured."""


def measure(losses_of: LossesOf, parameters: list[nn.Parameter], step: int) -> Measurement:
    """Measure at the parameters as they are, which stay so.

    Args:
        losses_of: computes the roles' losses, always in the same way: no dropout, no new data.
        parameters: all that train; their ``.grad`` is None after.
        step: updates done before.
    """
    losses = losses_of()
    gradients = role_gradients(losses.values(), parameters)
    gram_KK = gram(gradients).cpu()
    norms = gram_KK.diagonal().sqrt().tolist()
    return Measurement(
        step,
        {role: loss.item() for role, loss in losses.items()},
        dict(zip(losses, norms, strict=True)),
        cosines(gram_KK),
        transfer(losses_of, parameters, gradients, gram_KK),
    )


def summary(found: Sequence[Measurement], roles: Sequence[Role]) -> dict[str, Any]:
    """Sum all measurements up.

    Args:
        found: in the order of training.
        roles: of the rows and columns of their matrices.

    Returns:
        ``overall``: how many cosines were ``measured``, how many are ``negative`` and their
        ``share``, None of none; ``pairs``: that and ``mean``, ``low`` and ``high`` of the cosine of
        each pair; ``transfer``: the same of each cell, by the role stepped for and the role that it
        changes.
    """
    cosine_MKK = torch.stack([one.cosines for one in found])
    transfer_MKK = torch.stack([one.transfer for one in found])
    pairs = {
        pair_name(roles[i], roles[j]): _counted(cosine_MKK[:, i, j])
        for i, j in combinations(range(len(roles)), 2)
    }
    upper = torch.ones(len(roles), len(roles)).triu(1).bool()
    counted = _counted(cosine_MKK[:, upper])
    return {
        "overall": {key: counted[key] for key in ("measured", "negative", "share")},
        "pairs": pairs,
        "transfer": {
            one: {other: _counted(transfer_MKK[:, i, j]) for j, other in enumerate(roles)}
            for i, one in enumerate(roles)
        },
    }


def plain(one: Measurement, roles: Sequence[Role]) -> dict[str, Any]:
    """A measurement in plain types, ready for JSON, with None for NaN."""
    cosine, moved = one.cosines.tolist(), one.transfer.tolist()
    pairs = combinations(range(len(roles)), 2)
    return {
        "step": one.step,
        "losses": {role: _number(value) for role, value in one.losses.items()},
        "norms": {role: _number(value) for role, value in one.norms.items()},
        "cosines": {pair_name(roles[i], roles[j]): _number(cosine[i][j]) for i, j in pairs},
        "transfer": {
            role: dict(zip(roles, map(_number, row), strict=True))
            for role, row in zip(roles, moved, strict=True)
        },
    }


def _counted(values: Tensor) -> dict[str, float | int | None]:
    """Of numbers that may be NaN: how many there are, how many are below zero, mean and range."""
    known = values[values.isfinite()]
    n, negative = len(known), int((known < 0).sum())
    if not n:
        return dict.fromkeys(("share", "mean", "low", "high")) | {"measured": 0, "negative": 0}
    return {
        "measured": n,
        "negative": negative,
        "share": negative / n,
        "mean": known.mean().item(),
        "low": known.min().item(),
        "high": known.max().item(),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None

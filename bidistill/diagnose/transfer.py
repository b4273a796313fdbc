"""What a small step for one loss does to the others.

To first order a step along -g_i changes loss j by -<g_i, g_j> times its length over |g_i|: the
cosine says it all. Loss surfaces bend, though: the step is really taken, the losses are looked at,
and the parameters are put back.

Legend: K losses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from bidistill.data.records import Role
from bidistill.gradients import Gradient, negligible

LossesOf = Callable[[], Mapping[Role, Tensor]]
"""Computes the losses of the roles at the parameters as they are."""

SHARE = 0.01
"""Of its own loss, that the first step tried would take off a role if its loss were linear."""
TOLERANCE = 0.1
"""By how much, relatively, a role's own loss may miss what its gradient promises."""
SHORTER, TRIES = 4, 6
"""A step that misses it is taken again, so many times shorter, so many times in all."""


def transfer(
    losses_of: LossesOf,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Gradient],
    gram_KK: Float64[Tensor, "K K"],
) -> Float64[Tensor, "K K"]:
    """Change of each role's loss by a small step along minus each role's gradient.

    T_ij = (L_j(theta - s g_i) - L_j(theta)) / (s |g_i| |g_j|), without unit. For a vanishing step
    that is minus the cosine, and -1 for i = j. Divided by both norms, because |g_i|^2 alone would
    make a role with a weak gradient look like the greatest danger to one with a strong one. T_ij
    below 0: the step helps j. What T_ij has beyond minus the cosine comes from curvature.

    A step is small enough when the role's own loss falls by what its gradient promises, to a
    tenth; that also shows that it is not lost in rounding. It begins where 1 % of the role's loss
    would be gone and is shortened until then.

    Args:
        losses_of: the same function of the parameters at every call.
        parameters: what the gradients are by. Moved, and put back to the bit whatever happens.
        gradients: of the losses at these parameters, in the order of ``losses_of``.
        gram_KK: their inner products, on the CPU.

    Returns:
        Row: the role that the step was for. NaN in rows without a step small enough, and in rows
        and columns of negligible gradients.

    Cost: a copy of the parameters, and 1 + K to 1 + 6 K forward passes.
    """
    norm_K = gram_KK.diagonal().sqrt()
    norm_K = norm_K.where(~negligible(norm_K), torch.nan)
    rows_KK = torch.full_like(gram_KK, torch.nan)
    with torch.no_grad(), restored(parameters) as restore:
        before_K = _values(losses_of())
        for i, gradient in enumerate(gradients):
            square = norm_K[i].square()
            step = SHARE * before_K[i].abs() / square
            for _ in range(TRIES if step.isfinite() else 0):
                restore()
                _move(parameters, gradient, -step.item())
                change_K = _values(losses_of()) - before_K
                if abs(change_K[i] / (step * square) + 1) <= TOLERANCE:
                    rows_KK[i] = change_K / (step * norm_K[i] * norm_K)
                    break
                step = step / SHORTER
    return rows_KK


@contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Put the parameters back, to the bit, when the block ends or fails.

    Yields:
        A function that puts them back at once.
    """
    saved = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)

    try:
        yield restore
    finally:
        restore()


def _values(losses: Mapping[Role, Tensor]) -> Float64[Tensor, " K"]:
    return torch.stack(list(losses.values())).double().cpu()


def _move(parameters: Sequence[nn.Parameter], gradient: Gradient, by: float) -> None:
    """Add a multiple of a gradient."""
    for parameter, part in zip(parameters, gradient, strict=True):
        if part is not None:
            parameter.add_(part, alpha=by)

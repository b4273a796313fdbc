"""From the gradients of several losses to one direction.

The roles share the parameters and may want opposite changes. A combiner decides by what factors
their gradients are added up:

.. code-block:: text

    loss of each role --backward--> g_1 ... g_K --gram--> G --weights--> w,   descend sum_k w_k g_k

All combiners here need only the inner products G_kl = <g_k, g_l>, K x K numbers. So each is a
function of them, without regard to how the parameters are cut into tensors, and of sharded
gradients nothing but G is sent around.

Cost: ``sum`` is one backward pass of the summed loss, as without any combiner. The others take a
backward pass for each of the K roles, each through the whole pack, hold K gradients of all that
trains, and run the roles' losses in calls of their own.

Legend: K roles.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from bidistill.config import Combine
from bidistill.data.records import KEEPING, Role
from bidistill.gradients import cosines, gram, negligible, role_gradients
from bidistill.objectives import StepResult


def backward(
    results: Iterable[StepResult],
    parameters: Sequence[nn.Parameter],
    combine: Combine,
    seed: str,
    scale: float = 1.0,
) -> dict[tuple[Role, Role], float]:
    """Put the combined gradient of a step into ``.grad``, which is None before.

    A gradient that is not finite makes the combined one so, for the caller to notice.

    Args:
        results: of the parts of the step, each of which is run backward before the next is asked
            for; they have the losses by role, the same roles in each, unless ``combine`` is
            ``sum``.
        parameters: all that train. Each backward pass must leave whole gradients there: so it is
            in one process and under FSDP2, but not under DistributedDataParallel, which reduces
            once a forward.
        combine: name of the combiner.
        seed: of what a combiner draws; the same on all ranks.
        scale: factor on all losses.

    Returns:
        The cosine of each pair of roles' gradients, NaN if one is negligible; none for ``sum``.
    """
    if combine == "sum":
        for result in results:
            (result.loss * scale).backward()
        return {}
    roles, gradients = (), None
    for result in results:
        roles = tuple(result.role_losses)
        losses = [loss * scale for loss in result.role_losses.values()]
        gradients = _added(gradients, role_gradients(losses, parameters))
    assert gradients is not None, "no part"
    gram_KK = gram(gradients).cpu()
    factors = weights(combine, gram_KK, roles, seed)
    for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
        parameter.grad = _weighted_sum(factors, parts)
    cosines_KK = cosines(gram_KK).tolist()
    pairs = combinations(range(len(roles)), 2)
    return {(roles[i], roles[j]): cosines_KK[i][j] for i, j in pairs}


def _added(
    before: list[list[Tensor | None]] | None, more: list[list[Tensor | None]]
) -> list[list[Tensor | None]]:
    """Gradients of the same losses, summed."""
    if before is None:
        return more
    for row, other in zip(before, more, strict=True):
        for i, gradient in enumerate(other):
            total = row[i]
            row[i] = gradient if total is None else total if gradient is None else total + gradient
    return before


def weights(
    combine: Combine, gram_KK: Float64[Tensor, "K K"], roles: Sequence[Role], seed: str
) -> list[float]:
    """Return the factors of the K gradients, by the name of a combiner.

    Args:
        combine: name of the combiner; ``sum`` has factors of one.
        gram_KK: inner products, on the CPU. Factors of one if they are not finite.
        roles: which role each gradient is of.
        seed: of the order in which PCGrad goes through the roles.
    """
    if combine == "sum" or not gram_KK.isfinite().all():
        return [1.0] * len(roles)
    if combine == "pcgrad":
        return pcgrad(gram_KK, random.Random(seed)).tolist()
    if combine == "mgda":
        return mgda(gram_KK).tolist()
    return ngdiff(gram_KK, [role not in KEEPING for role in roles]).tolist()


def pcgrad(gram_KK: Float64[Tensor, "K K"], draw: random.Random) -> Float64[Tensor, " K"]:
    """Projecting conflicting gradients: take out of each what goes against another.

    For each k: h = g_k; for all l != k in random order, if <h, g_l> < 0:
    h <- h - <h, g_l> / |g_l|^2 g_l. The direction is the sum of the h. Every h is a combination of
    the original gradients, so its coefficients are all there is to keep. A negligible gradient has
    a direction by chance alone, and nothing is taken out along it.

    Args:
        gram_KK: inner products of the gradients.
        draw: gives the orders.

    Returns:
        w with sum_k h_k = sum_l w_l g_l.

    Source: Yu et al. 2020, arXiv:2001.06782, algorithm 1.
    """
    K = len(gram_KK)
    rows_KK = torch.eye(K, dtype=gram_KK.dtype)
    noise_K = negligible(gram_KK.diagonal().sqrt()).tolist()
    for k in range(K):
        for other in draw.sample([i for i in range(K) if i != k], K - 1):
            if noise_K[other]:
                continue
            product = rows_KK[k] @ gram_KK[:, other]
            if product < 0:
                rows_KK[k, other] -= product / gram_KK[other, other]
    return rows_KK.sum(0)


def mgda(gram_KK: Float64[Tensor, "K K"]) -> Float64[Tensor, " K"]:
    """Multiple gradient descent: the shortest vector in the convex hull of the gradients.

    w = argmin |sum_k w_k g_k|^2 over w >= 0, sum_k w_k = 1. Its direction d satisfies
    <d, g_k> >= |d|^2 for all k: no loss grows, to first order. The hull's closest point lies inside
    one of its faces, so all 2^K - 1 are tried, fifteen for four roles, each by one linear system:
    exact, without iterations.

    A gradient that is zero beside the largest (``bidistill/gradients.py`` says when) has weight 0.
    Taken to the letter it would be the answer and stop the training, and a role whose teacher is
    the model itself begins with one. A short gradient that is none of rounding is most of the
    answer: the method cares for whoever is nearly there.

    Args:
        gram_KK: inner products of the gradients.

    Returns:
        w; all 1/K if every gradient is zero.

    Source: Sener & Koltun 2018, arXiv:1810.04650, equation 3, without its normalisations.
    """
    K = len(gram_KK)
    active = (~negligible(gram_KK.diagonal().sqrt())).nonzero().squeeze(1).tolist()
    best_K, shortest = gram_KK.new_full((K,), 1 / K), torch.inf
    scaled_KK = gram_KK / gram_KK.diagonal().max()
    for size in range(1, len(active) + 1):
        for face in map(list, combinations(active, size)):
            point = _closest_in_plane(scaled_KK[face][:, face])
            if point is None or point.min() < 0:
                continue
            square = (point @ scaled_KK[face][:, face] @ point).item()
            if square < shortest:
                best_K, shortest = gram_KK.new_zeros(K), square
                best_K[face] = point
    return best_K


def ngdiff(gram_KK: Float64[Tensor, "K K"], forgetting: Sequence[bool]) -> Float64[Tensor, " K"]:
    """Normalised gradient difference: what must go and what must stay count alike.

    The source descends g_R / |g_R| - g_F / |g_F|, g_F of a loss on the forget set that is to grow.
    Here every loss is to fall, that of the forget set too, as it leads to the teacher; with this
    sign the direction is

    g_keep / |g_keep| + g_forget / |g_forget|,

    g_keep the sum of the gradients of ``neighbor`` and ``retain``, g_forget of all others. This
    reading is ours; where the loss of the forget set is the negative of one that is to grow, it is
    the source's direction. The source's learning rate, found anew as training goes, is left out:
    the recipe's schedule stays.

    Args:
        gram_KK: inner products of the gradients.
        forgetting: of each gradient, whether it belongs to the forget group.

    Returns:
        1 / |sum of its group| for each gradient; 0 for a group that has none or a negligible one,
        which has no direction but that of rounding.

    Source: arXiv:2410.22086.
    """
    group_2K = torch.tensor([[not f for f in forgetting], forgetting], dtype=gram_KK.dtype)
    # rounding may take a sum of opposite gradients below zero
    norm_2 = (group_2K @ gram_KK @ group_2K.T).diagonal().clamp(min=0).sqrt()
    factor_2 = torch.where(negligible(norm_2), 0.0, 1 / norm_2)
    return factor_2 @ group_2K


def _closest_in_plane(gram_SS: Tensor) -> Tensor | None:
    """Weights, of sum 1, of the plane's shortest vector; None if its points are dependent."""
    S = len(gram_SS)
    system = torch.nn.functional.pad(gram_SS, (0, 1, 0, 1), value=1.0)
    system[S, S] = 0
    solution, failed = torch.linalg.solve_ex(system, torch.eye(S + 1, dtype=system.dtype)[S])
    return None if failed or not solution.isfinite().all() else solution[:S]


def _weighted_sum(factors: Sequence[float], parts: Iterable[Tensor | None]) -> Tensor | None:
    """Sum in the memory of the first part; None if nothing depends on the parameter."""
    total = None
    for factor, part in zip(factors, parts, strict=True):
        if part is None:
            continue
        total = part.mul_(factor) if total is None else total.add_(part, alpha=factor)
    return total

"""Gradients of several losses, and the angles between them.

Legend: K losses.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

Gradient: TypeAlias = Sequence[Tensor | None]
"""Of one loss: a tensor for each parameter, None where the loss does not depend on it."""

NEGLIGIBLE = 1e-5
"""A gradient that is shorter, relative to the longest one, is taken for zero: the rounding of fp32
leaves about 1e-7, and a role whose student still equals its teacher has nothing else."""
PIECE = 1 << 20
"""Elements that :func:`gram` turns into fp64 at a time."""


def role_gradients(
    losses: Iterable[Tensor], parameters: Sequence[nn.Parameter]
) -> list[list[Tensor | None]]:
    """Run a backward pass for each loss and take what it leaves in ``.grad``, which is None after.

    Args:
        losses: scalars of one graph, which is freed.
        parameters: to be differentiated by; what their ``.grad`` holds before is dropped.
    """
    losses, gradients = list(losses), []
    for parameter in parameters:
        parameter.grad = None
    for k, loss in enumerate(losses, start=1):
        loss.backward(retain_graph=k < len(losses))
        gradients.append([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    return gradients


def gram(gradients: Sequence[Gradient]) -> Float64[Tensor, "K K"]:
    """Inner products of gradients, G_kl = sum over parameters <g_k, g_l>.

    Of DTensors each rank multiplies its own shards, and the products alone are summed over the
    mesh: one all-reduce of K x K numbers for all parameters of one mesh and placement.

    Args:
        gradients: K of them. A parameter's tensors are of one shape, device and placement.

    Returns:
        On the gradients' device and the same on all ranks.

    Numerics: products and sums in fp64, whatever the gradients are.
    Memory: 12 K PIECE bytes beside the gradients.
    """
    K = len(gradients)
    sums: dict[object, tuple[Tensor, DTensor | None]] = {}
    for parts in zip(*gradients, strict=True):
        like = next((part for part in parts if part is not None), None)
        if like is None:
            continue
        whole = [torch.zeros_like(like) if part is None else part for part in parts]
        if isinstance(like, DTensor):
            key, sharded = (like.device_mesh, like.placements), like
            products_KK = _products([part.to_local() for part in whole])  # type: ignore
        else:
            key, sharded, products_KK = None, None, _products(whole)
        before = sums.get(key)
        sums[key] = (products_KK if before is None else before[0] + products_KK), sharded
    totals = [_over_mesh(products_KK, sharded) for products_KK, sharded in sums.values()]
    return torch.stack(totals).sum(0) if totals else torch.zeros(K, K, dtype=torch.float64)


def cosines(gram_KK: Float64[Tensor, "K K"]) -> Float64[Tensor, "K K"]:
    """Cosines of the angles between gradients, G_kl / sqrt(G_kk G_ll); NaN for negligible ones."""
    norm_K = gram_KK.diagonal().sqrt()
    norm_K = norm_K.where(~negligible(norm_K), torch.nan)
    return (gram_KK / norm_K[:, None] / norm_K).clamp(-1, 1)


def negligible(norm_K: Float64[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """Tell which lengths are zero beside the largest of them, by `NEGLIGIBLE`.

    Example:
        >>> negligible(torch.tensor([3e-8, 0.5, 2.0], dtype=torch.float64)).tolist()
        [True, False, False]
    """
    return norm_K <= NEGLIGIBLE * norm_K.max()


def _products(tensors: Collection[Tensor]) -> Tensor:
    """K x K inner products of K tensors of one shape."""
    rows = [tensor.detach().reshape(-1) for tensor in tensors]
    total_KK = rows[0].new_zeros(len(rows), len(rows), dtype=torch.float64)
    for pieces in zip(*(row.split(PIECE) for row in rows), strict=True):
        block = torch.stack(pieces).double()
        total_KK += block @ block.T
    return total_KK


def _over_mesh(products_KK: Tensor, sharded: DTensor | None) -> Tensor:
    """Sum products of shards over the dimensions of the mesh that the shards are cut by."""
    if sharded is None:
        return products_KK
    assert not any(p.is_partial() for p in sharded.placements), "a gradient not yet reduced"
    how = [p if p.is_replicate() else Partial() for p in sharded.placements]
    return DTensor.from_local(products_KK, sharded.device_mesh, how).full_tensor()

"""How a model is shared out among the ranks of a run.

One mechanism: FSDP2's `fully_shard` on a mesh of (replicate, shard) ranks.

.. code-block:: text

    shard = 1             every rank holds the whole model (data parallel)
    shard = world size    one copy, shared out among all ranks (FSDP)
    between               groups of `shard` ranks, each with a copy of its own (HSDP)

Each transformer block is a unit, and so is a head of its own; the root holds the rest: embedding,
norm, and a head that is tied to the embedding, for a tied parameter may be in one unit only. What
runs the model is a method of the root (see models.py), so that the hooks of all units fire, and
units are whole where they are read.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from bidistill.config import ParallelConfig
from bidistill.errors import UserError
from bidistill.models import ROOT_METHODS, blocks
from bidistill.progress import say
from bidistill.world import World, device


def shard(model: nn.Module, config: ParallelConfig, world: World, dtype: torch.dtype) -> None:
    """Share a model out among the ranks, in place; with one rank, at most recompute blocks.

    Args:
        model: alike on all ranks, whole or on the meta device, with its root methods attached.
        config: how many ranks share one copy.
        world: of this run.
        dtype: that weights are gathered and computed in; below fp32, gradients are still added up
            in fp32, and what trains stays fp32.

    Raises:
        UserError: the ranks cannot be cut into groups of `config.shard`.
    """
    group = config.shard or world.size
    if world.size % group:
        raise UserError(
            f"parallel.shard: got {group} with {world.size} ranks, expected a number that divides "
            "them; change it, or start another number of processes"
        )
    if config.recompute:
        recompute_blocks(model)
    if world.size == 1:
        if config.offload:
            say("parallel.offload: does nothing, as one process shares nothing out")
        return
    kind = device().type
    mesh = init_device_mesh(
        kind, (world.size // group, group), mesh_dim_names=("replicate", "shard")
    )
    if group == world.size:
        mesh = mesh["shard"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != torch.float32:
        policy = replace(policy, param_dtype=dtype, reduce_dtype=torch.float32)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if config.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=kind == "cuda")
    for block in blocks(model):
        fully_shard(block, **settings)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore
    if head.weight is not embedding.weight:
        # read right after it is gathered, and again in the backward that follows
        fully_shard(head, reshard_after_forward=False, **settings)
    fully_shard(model, **settings)
    for name in ROOT_METHODS:
        register_fsdp_forward_method(model, name)


def recompute_blocks(model: nn.Module) -> None:
    """Keep the inputs of the blocks alone, and run each block again in each backward.

    The forward is wrapped, not hooked: PyTorch's composable form takes one backward a forward, and
    combiners take one for each role.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def reduce_gradients(model: nn.Module, *, after: bool) -> None:
    """Say whether the next backward ends with the ranks' gradients added up.

    Until then each rank keeps its own in full, which saves traffic and costs memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(after)


def put_back(model: nn.Module) -> None:
    """Leave each rank with its own parts of the weights, after a forward without a backward.

    The units of the root and of a head of its own stay whole for the backward that should follow.
    Without one, whoever then asks the model for its parameters gets the whole ones, which never
    see a gradient.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # of its own unit only


@torch.no_grad()
def put(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values, those that the first rank has; all ranks must do it together.

    Args:
        parameter: whole, or shared out.
        values: whole, of the same shape.
    """
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        shared = distribute_tensor(values.to(mesh.device_type), mesh, parameter.placements)
        parameter.to_local().copy_(shared.to_local())
    else:
        parameter.copy_(values)


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be shared out; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be shared out; all ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

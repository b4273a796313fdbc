"""What stands where a step on fake tensors could not do what a real one does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed._tools import fake_collectives  # noqa: F401 - collectives take fakes
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.integrations import moe

from bidistill import attention, models
from bidistill.config import TrainConfig
from bidistill.errors import UserError
from bidistill.models import base_rows, own_rows
from bidistill.plan.tracker import Tracker
from bidistill.world import World
from bidistill_kernels import _backends, _loss, _ops
from bidistill_kernels._checks import Side


@contextmanager
def stand_ins(tracker: Tracker, target: str, device: torch.device) -> Iterator[None]:
    """Let the losses take fakes, and as much room as on the device that is meant."""
    settings, as_autocast = _loss.settings, _loss.as_autocast

    def chosen(hidden: Tensor, backend: str, chunk_bytes: int | None) -> tuple[str, int]:
        if target == device.type:
            return settings(hidden, backend, chunk_bytes)
        return "triton", chunk_bytes or _backends.sizes("triton", target).chunk_bytes

    def cast(side: Side) -> Side:
        if target == device.type or side.weight is None or not torch.is_autocast_enabled("cpu"):
            return as_autocast(side)
        halves = side.hidden.to(torch.bfloat16), side.weight.to(torch.bfloat16)
        return side._replace(hidden=halves[0], weight=halves[1])

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            with tracker.of("teacher"):
                return function(*args, **kwargs)

        return run

    attention._square_mask.cache_clear()  # real masks; and none of ours may stay
    with (
        # it copies tensors of other types than Tensor, for which a compiler plans memory
        mock.patch.object(_ops, "scaled", lambda saved, factor: saved.detach()),
        mock.patch.object(moe, "_grouped_mm", _product_of_experts),
        mock.patch.object(_loss, "settings", chosen),
        mock.patch.object(_loss, "as_autocast", cast),
        mock.patch.object(models, "base_rows", counted(base_rows)),
        mock.patch.object(models, "own_rows", counted(own_rows)),
    ):
        try:
            yield
        finally:
            attention._square_mask.cache_clear()


@contextmanager
def plannable(config: TrainConfig) -> Iterator[None]:
    """Make one line of what fakes cannot do."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"model.path: got {config.model.path}, where sizes depend on the values of tensors "
            f"({error.func}), expected one whose sizes do not; it cannot be planned, train a few "
            "steps of it instead"
        ) from None


def _product_of_experts(tokens: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """What transformers' product of each token with its expert's weights makes, on fakes.

    All tokens go to the first expert, as nobody knows whose they are: the shapes are the same, and
    so is what the backward keeps. PyTorch's own knows fakes of bf16 alone.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        return tokens.to(weights.dtype) @ weights[0]


@contextmanager
def alone_among(world: World) -> Iterator[None]:
    """A process group of so many ranks, of which only this one is there."""
    if world.size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()

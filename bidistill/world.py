"""The processes of a run: who this one is, and what they add up or wait for together.

Started by ``torchrun``, which sets RANK, LOCAL_RANK, WORLD_SIZE and the address to meet at; without
it a run is one process.
"""

import atexit
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from bidistill.errors import UserError

Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)
"""How long ranks wait for one that tokenises, or writes the result."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Over which they talk; None: that of the process."""

    def alongside(self) -> "World":
        """The same ranks over a group of their own on CPUs, for a thread beside the one that asks.

        What ranks send each other must come in the same order on all of them, and two threads of a
        process have none. All ranks must ask together.
        """
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs and results."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float] | Tensor) -> Tensor:
        """Add up what the ranks have, in fp64, so that counts are exact.

        Args:
            numbers: as many on every rank. Shape (N,).

        Returns:
            The same sums on every rank, on the CPU. Shape (N,).
        """
        given = torch.as_tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return given.cpu()
        total = given.to("cpu" if self.group else device(), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; the answer is the same on all."""
        return (self.size > 1 and self.sum([float(here)]).item() > 0) or here

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first rank run the block alone, then the others: it makes what they find.

        If it fails there, the others are not kept waiting: they run the block and fail themselves.
        """
        if not self.first:
            self.barrier()
        try:
            yield
        finally:
            if self.first:
                self.barrier()

    def share(self, item: Item | None, source: int = 0) -> Item:
        """What one rank has, the first or another, on all; anything that pickle takes."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items, src=source, group=self.group)
        return items[0]  # type: ignore - the source has one

    def gather(self, item: Item) -> list[Item]:
        """What every rank has, by rank, on all; anything that pickle takes."""
        items = [item] * self.size
        if self.size > 1:
            dist.all_gather_object(items, item, group=self.group)
        return items

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier(group=self.group)


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def join() -> World:
    """Join the processes that ``torchrun`` started; alone if it did not start this one.

    Raises:
        UserError: the environment is not whole.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if "WORLD_SIZE" not in os.environ:
        return World()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE: got it without {', '.join(missing)}, expected all of them; start the run "
            "with torchrun"
        )
    if torch.cuda.is_available():
        here, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if here >= there:
            raise UserError(
                f"LOCAL_RANK: got {here} with {there} CUDA devices, expected a device for each "
                "process; start fewer on this machine"
            )
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    if backend == "gloo":  # NCCL's end waits for ranks that may have failed
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    # what is shared out is in cycles, and holds results that gloo's threads let go of: a thread
    # that does so once the interpreter is ending aborts the process
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()

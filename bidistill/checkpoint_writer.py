"""Who writes the checkpoints of a run, one at a time: training itself, or a thread beside it.

.. code-block:: text

    in the foreground   save: write                       training waits for the disk
    in the background   save: wait for the one before,    training waits for the copy, and for the
                        copy to the host's memory         disk only where that is slower than the
                        thread: write                     steps between two checkpoints

The thread writes from a copy, as training changes weights, moments and averages in place, and its
ranks talk over a group of their own. Both ways write the same.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from bidistill import checkpoint
from bidistill.world import World, device


class Writer:
    """Writes checkpoints; all are complete when its context is left.

    All ranks make it, call it and leave it together. If the block raises, the checkpoint that is
    being written is finished nevertheless, where the other ranks still take part.

    Args:
        folder: where the checkpoints of the run lie.
        keep: checkpoints that stay.
        world: the ranks of the run; None: this process alone.
        background: whether training goes on while one is written. Takes memory of the host for a
            copy of what this rank has of a checkpoint.
    """

    def __init__(
        self, folder: Path, keep: int, world: World | None = None, *, background: bool = False
    ) -> None:
        """Make the thread and its group, if there are to be any."""
        self.folder = folder
        self.keep = keep
        self.world = world or World()
        self._thread = ThreadPoolExecutor(1, "checkpoint", _same_device) if background else None
        self._its_world = self.world.alongside() if background else self.world
        self._copier = DefaultStager(StagingOptions(False, False, False, False))
        self._in_flight: Future[Path] | None = None
        self._open = ExitStack()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        teacher: Mapping[str, Tensor] = MappingProxyType({}),
        protect: int | None = None,
    ) -> None:
        """Write a checkpoint of what is now, or begin to.

        Args:
            model: its parameters that are ``checkpoint.made`` are saved.
            optimizer: over exactly those that train.
            state: what else resuming needs, as JSON; has ``step``, the number of steps done.
            teacher: tensors of a teacher that changes with the run, by name.
            protect: step whose checkpoint stays, however old it is.

        Raises:
            UserError: this checkpoint, or the one before in the background, cannot be written.
        """
        self.finish()
        tensors = checkpoint.tensors(model, optimizer, self.world, teacher)
        if self._thread is None:
            checkpoint.write(self.folder, tensors, state, self.keep, self.world, protect)
            return
        copy: Any = self._copier.stage(tensors)
        self._in_flight = self._thread.submit(
            checkpoint.write, self.folder, copy, state, self.keep, self._its_world, protect
        )

    def finish(self) -> None:
        """Wait until all that was to be saved is complete.

        Raises:
            UserError: it cannot be written; on all ranks.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def __enter__(self) -> "Writer":
        """Clear away what a killed run left, and keep PyTorch from talking of itself."""
        if self.world.first:
            checkpoint.clear(self.folder)
        self._open.enter_context(checkpoint.quiet())
        if self._thread is not None:
            self._open.enter_context(self._thread)  # waits for it, and swallows its error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish; an error of the block goes before one of the thread."""
        with self._open:
            if kind is None:
                self.finish()


def _same_device() -> None:
    """Let a thread use the accelerator of its process, and not the first one there is."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())

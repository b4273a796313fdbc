"""What the bits of a run depend on beside its recipe: versions, hardware, and how it is cut up.

All of it may change when a run is resumed; then it goes on, but equal up to rounding only, and a
line says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bidistill import about
from bidistill.config import ParallelConfig
from bidistill.progress import say
from bidistill.world import World, device

PACKAGES = ("bidistill", "torch", "transformers", "peft")
"""Those that a step is computed by."""


def now(parallel: ParallelConfig, world: World) -> dict[str, Any]:
    """The circumstances of this process, as JSON.

    Returns:
        ``versions`` by package; and ``cut``: the ranks, the device and, on CPUs, its threads, and
        the keys of the recipe's section ``parallel``, with ``shard`` as a number.
    """
    threads = f"CPU with {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device()) if device().type == "cuda" else threads
    section = asdict(parallel) | {"shard": parallel.shard or world.size}
    cut = {"ranks": world.size, "device": name}
    cut |= {f"parallel.{key}": value for key, value in section.items()}
    return {"versions": about.versions(), "cut": cut}


def tell_changes(before: Mapping[str, Any] | None, today: Mapping[str, Any]) -> None:
    """Print a line for each way in which a run goes on in other circumstances than it came to.

    Args:
        before: those of the checkpoint; None if it is from a version that did not record them.
        today: those of now.
    """
    if before is None:
        return
    if versions := _changes(before["versions"], today["versions"], PACKAGES):
        say(f"resuming with {versions}: results may differ by rounding")
    if cut := _changes(before["cut"], today["cut"], tuple(today["cut"])):
        say(f"resuming with {cut}: equal up to rounding, not bit for bit")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What differs, as text; empty if nothing does."""
    return ", ".join(
        f"{key} {new[key]} (before: {old.get(key)})" for key in keys if old.get(key) != new[key]
    )

"""What a run took: ``cost.json`` in its folder, written when training is done.

.. code-block:: text

    seconds     of training, of all that lies in the result: from the first step of each start
                to its last checkpoint, or to the end; without loading, without the export
    steps       steps done
    tokens      of the student's packs, all ranks and steps
    ranks       processes at the end
    peak_bytes  most memory of each rank's process, by rank, since its last start
    peak_of     "cuda allocations": what PyTorch allocated there; "resident set": all of the
                process on the host

What a killed run did after its last checkpoint is done again, and counts once.
"""

import re
import resource
import sys
from pathlib import Path

import torch

from bidistill.files import write_json
from bidistill.world import World

COST = "cost.json"
PROCESS = Path("/proc/self/status")
"""Of Linux."""


def write(folder: Path, steps: int, seconds: float, tokens: int, world: World) -> None:
    """Write ``cost.json``; all ranks together.

    Args:
        folder: of the run.
        steps: done.
        seconds: that they took.
        tokens: that they read.
        world: the ranks of the run.
    """
    peaks = world.gather(peak_bytes())
    if world.first:
        record = {
            "seconds": round(seconds, 1),
            "steps": steps,
            "tokens": tokens,
            "ranks": world.size,
            "peak_bytes": peaks,
            "peak_of": "cuda allocations" if torch.cuda.is_available() else "resident set",
        }
        write_json(folder / COST, record)


def peak_bytes() -> int:
    """Most memory that this process had at a time: allocations on CUDA, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if PROCESS.exists():  # what getrusage says begins at the peak of whoever started the process
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", PROCESS.read_text(encoding="ascii"))
        return 1024 * int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB, but for macOS

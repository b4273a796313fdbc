"""What this installation computes with, and why."""

import torch

from bidistill_kernels._native import load


def info() -> dict[str, str]:
    """Describe each back-end in a line, for people and for the record of a run.

    Returns:
        One entry each for ``torch``, ``cuda`` and ``native``: what is in use, or why it is not.

    Example:
        >>> sorted(info())
        ['cuda', 'native', 'torch']
    """
    cuda = f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else "absent: no device"
    return {
        "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads",
        "cuda": cuda,
        "native": load().reason,
    }

"""What this installation computes with, and why."""

from importlib import metadata

import torch

from bidistill_kernels._backends import HAS_TRITON, INTERPRETED
from bidistill_kernels._native.library import load


def info() -> dict[str, str]:
    """Describe each back-end in a line, for people and for the record of a run.

    Returns:
        One entry each for ``torch``, ``cuda``, ``triton`` and ``native``: what is in use, or why it
        is not.

    Example:
        >>> sorted(info())
        ['cuda', 'native', 'torch', 'triton']
    """
    has_cuda = torch.cuda.is_available()
    return {
        "torch": f"{torch.__version__}, {torch.get_num_threads()} CPU threads",
        "cuda": torch.cuda.get_device_name() if has_cuda else "absent: no device",
        "triton": _triton(has_cuda=has_cuda),
        "native": load().reason,
    }


def _triton(*, has_cuda: bool) -> str:
    if not HAS_TRITON:
        return "absent: not installed"
    version = metadata.version("triton")
    if has_cuda:
        return version
    return f"{version}, interpreted on CPU" if INTERPRETED else f"{version}, idle: no device"

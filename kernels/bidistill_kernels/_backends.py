"""The back-ends: which there are, which one a call gets, and what each wants from the driver.

torch    PyTorch, every device and dtype; the reference
triton   Triton row kernels on CUDA and ROCm devices; on CPU only under Triton's interpreter
native   C++ row kernels on CPU

A back-end is a module with `logits`, `gather_dot`, `sparse_dx`, `sparse_dw` and `sparse_dbias` (see
`_torch_rows.py`) and, for each dense loss, a row function.
"""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from bidistill_kernels._native.library import load as load_native
from bidistill_kernels._rows import ROW_LOSSES, Logits, RowFunction
from bidistill_kernels.transform import LogitTransform

NAMES = ("torch", "triton", "native")
# looked up once: a compiled graph must not look for files
HAS_TRITON = find_spec("triton") is not None
NO_NATIVE = None if load_native().library is not None else load_native().reason
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Backend(Protocol):
    """What a back-end's module offers."""

    def logits(self, raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Logits:
        """Return the `Logits` of raw products."""
        ...

    def gather_dot(
        self, hidden_CD: Tensor, weight_VD: Tensor, ids_CK: Tensor, bias_V: Tensor | None
    ) -> Tensor:
        """Return the raw logits at ids, without a projection."""
        ...

    def sparse_dx(
        self, values_CK: Tensor, ids_CK: Tensor, weight_VD: Tensor, out_CD: Tensor
    ) -> None:
        """Write the hidden states' gradient."""
        ...

    def sparse_dw(
        self, values_NK: Tensor, ids_NK: Tensor, hidden_ND: Tensor, out_VD: Tensor
    ) -> None:
        """Write the head's gradient into zeros."""
        ...

    def sparse_dbias(self, values_NK: Tensor, ids_NK: Tensor, out_V: Tensor) -> None:
        """Write the bias's gradient into zeros."""
        ...


class Sizes(NamedTuple):
    """Memory that a back-end works well with, bytes; measured in kernels/README.md#traffic."""

    chunk_bytes: int
    """Logits of both models that exist at a time, unless the caller says otherwise."""
    block_bytes: int
    """Logits of one model that a row function sees at a time."""
    slab_bytes: int
    """16-bit gradient of the logits that is collected before it meets the hidden states; 0: each
    chunk's gradient takes the place of its logits and is used at once."""


# On CPU more than 64 MiB gains a few per cent, a quarter of it loses a third, and a block of 1 MiB
# stays with its four companions in a core's share of the cache
_CPU = Sizes(64 << 20, 1 << 20, 0)
# The library walks a chunk row by row itself. 88 MiB are 234 rows of two models at 49152 ids, which
# makes 208 of 1024; more gains little, and this leaves room for products' own memory in 96 MiB
_NATIVE = Sizes(88 << 20, 1 << 62, 0)
# an accelerator needs about 1024 rows to be busy
_ACCELERATOR = Sizes(1 << 30, 1 << 62, 0)
# an fp32 sum of dW moves 8 V D bytes a product, as much time as 1024 rows of it: 4096 rows at once
_TRITON = Sizes(1 << 30, 1 << 62, 1 << 30)


def sizes(backend: str, device_type: str) -> Sizes:
    """Return the sizes of a back-end on a device."""
    if backend == "triton":
        return _TRITON
    if backend == "native":
        return _NATIVE
    return _CPU if device_type == "cpu" else _ACCELERATOR


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the back-end that a call gets; one named explicitly is refused, never replaced.

    Raises:
        ValueError: it is unknown, not installed, or cannot compute this.
    """
    if backend == "torch":
        return backend
    if backend == "auto":
        return _best(device, dtype)
    if backend not in NAMES:
        names = ", ".join(map(repr, ("auto", *NAMES)))
        raise ValueError(f"backend: got {backend!r}, expected one of {names}")
    missing = (_why_not_native if backend == "native" else _why_not_triton)(device, dtype)
    if missing is not None:
        raise ValueError(
            f"backend: got {backend!r}, {missing}; pass 'auto' for the best one present"
        )
    return backend


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        return "torch" if _why_not_triton(device, dtype) else "triton"
    if _why_not_native(device, dtype) is None:
        return "native"
    if device.type == "cpu" and dtype != torch.float64 and not torch.compiler.is_compiling():
        _say_slower()
    return "torch"


@cache
def _say_slower() -> None:
    """Say once why the CPU is slower than it could be."""
    logging.getLogger("bidistill_kernels").warning(
        "losses on the CPU run on PyTorch, slower than on the native library, which is %s",
        NO_NATIVE,
    )


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
        return "which is not installed, expected an installed one"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"which has no kernels for {device.type}, expected tensors on a CUDA or ROCm device"
    if dtype == torch.float64:
        return "which computes in float32, expected tensors of at most float32"
    return None


def _why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"which has no kernels for {device.type}, expected tensors on the CPU"
    if dtype == torch.float64:
        return "which computes in float32, expected tensors of at most float32"
    if NO_NATIVE is not None:
        return f"which is {NO_NATIVE}"
    return None


@cache
def load(backend: str) -> Backend:
    """Return the back-end's module; Triton is imported here and nowhere earlier."""
    name = "_torch_rows" if backend == "torch" else f"_{backend}.backend"
    return cast(Backend, import_module(f"bidistill_kernels.{name}"))


@cache
def row_function(loss: str, backend: str) -> RowFunction:
    """Return the row function of a loss for a back-end."""
    entry = ROW_LOSSES[loss]
    if backend == "torch" or not entry.dense:
        return entry.function
    return import_module(f"bidistill_kernels._{backend}.{loss}").rows

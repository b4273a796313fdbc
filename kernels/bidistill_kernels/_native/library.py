"""The native library: found, loaded and given its ctypes signatures.

It is optional. A package without it, or with one that does not load, works through PyTorch; why
there is none can always be asked for.
"""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib import resources
from typing import ClassVar, NamedTuple

LIBRARY = "libbidistill_native.so"
ISA = "BIDISTILL_ISA"


class Model(ctypes.Structure):
    """`bd_model`: one model's logits and what makes them final."""

    _fields_: ClassVar = [
        ("logits", c_void_p),
        ("stride", c_int64),
        ("bias", c_void_p),
        ("inner", c_float),
        ("outer", c_float),
    ]


# kernels/csrc/bidistill.h; int64 must be said, ctypes passes a plain int as 32 bits
_SIZE = c_int64, c_int64
_GRADIENT = c_void_p, c_int64
_MODEL = POINTER(Model)
_SIGNATURES = {
    "bd_version": (c_char_p, ()),
    "bd_isa": (c_char_p, ()),
    "bd_set_isa": (c_int, (c_char_p,)),
    "bd_transform_f32": (c_int, (_MODEL, *_SIZE, c_int64)),
    "bd_bidirectional_kl_f32": (
        c_int,
        (_MODEL, _MODEL, c_void_p, *_SIZE, *[c_float] * 3, *_GRADIENT, c_void_p, c_int64),
    ),
    "bd_jsd_f32": (c_int, (_MODEL, _MODEL, *_SIZE, c_double, *_GRADIENT, c_void_p, c_int64)),
    "bd_kl_to_probs_f32": (
        c_int,
        (_MODEL, _MODEL, *_SIZE, c_float, *_GRADIENT, c_void_p, c_int64),
    ),
    "bd_cross_entropy_f32": (c_int, (_MODEL, c_void_p, *_SIZE, *_GRADIENT, c_void_p, c_int64)),
    "bd_log_sum_exp_f32": (c_int, (_MODEL, *_SIZE, c_void_p, c_int64)),
    "bd_softmax_gradient_f32": (
        c_int,
        (_MODEL, c_void_p, c_void_p, c_float, *_SIZE, *_GRADIENT, c_int64),
    ),
    "bd_top_ids_f32": (c_int, (_MODEL, *_SIZE, c_int64, c_void_p, c_int64)),
    "bd_elementary_f32": (c_int, (c_char_p, c_void_p, c_int64, c_void_p)),
}
# `bd_status`; all of them are errors of the caller
_STATUS = {
    1: "got a negative size, more ids than columns or less than one thread",
    2: "got rows that overlap, expected them at least a row apart",
    3: "got no memory where some is needed",
    4: "got an instruction set that this processor or library does not have",
    5: "got a name that does not exist",
}


class Native(NamedTuple):
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    """None if there is no library that works."""
    reason: str
    """One line: the version and instruction set if there is a library, else why not."""


@cache
def load() -> Native:
    """Load the library once per process; never raises for a library that is missing or broken.

    BIDISTILL_ISA in the environment names the instruction set to use: scalar, avx2, avx512, neon.
    """
    # files() of the package, not this file's folder: in an editable install they differ
    folder = resources.files("bidistill_kernels")
    with resources.as_file(folder / LIBRARY) as path:
        if not path.exists():
            return Native(None, f"absent: {_variant()}")
        try:
            library = ctypes.CDLL(str(path))
            for name, (restype, argtypes) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = restype, argtypes
        except (OSError, AttributeError) as error:  # wrong platform; built from older sources
            return Native(None, f"broken: {error}; install the package again")
    wanted = os.environ.get(ISA)
    if wanted and library.bd_set_isa(wanted.encode()):
        best = library.bd_isa().decode()
        return Native(
            None, f"refused: {ISA}: got {wanted!r}, which this processor lacks; its best is {best}"
        )
    return Native(library, f"version {library.bd_version().decode()}, {library.bd_isa().decode()}")


def call(name: str, *arguments: object) -> None:
    """Call a function of the library that returns a status.

    Raises:
        ValueError: the status is not 0; nothing was written.
    """
    library = load().library
    assert library is not None, load().reason
    status = getattr(library, name)(*arguments)
    if status:
        raise ValueError(f"{name}: {_STATUS.get(status, f'status {status}')}")


def _variant() -> str:
    """How the installed package was built, as the build noted it."""
    note = resources.files("bidistill_kernels") / "build.txt"
    if not note.is_file():
        return "these are sources that were not installed; run pip install"
    return f"this is a pure Python install ({note.read_text().strip()})"

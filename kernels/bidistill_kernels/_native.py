"""The native library: found, loaded and given its ctypes signatures.

It is optional. A package without it, or with one that does not load, works through PyTorch; why
there is none can always be asked for.
"""

import ctypes
from functools import cache
from importlib import resources
from typing import NamedTuple

LIBRARY = "libbidistill_native.so"

# kernels/csrc/bidistill.h; int64 must be said, ctypes passes a plain int as 32 bits
_SIGNATURES = {
    "bd_version": (ctypes.c_char_p, ()),
    "bd_logsumexp_f32": (
        ctypes.c_int,
        (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ),
}


class Native(NamedTuple):
    """The library, or the reason why there is none."""

    library: ctypes.CDLL | None
    """None if there is no library that works."""
    reason: str
    """One line: the version if there is a library, else why not."""


@cache
def load() -> Native:
    """Load the library once per process; never raises for a library that is missing or broken."""
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
    return Native(library, f"version {library.bd_version().decode()}")


def _variant() -> str:
    """How the installed package was built, as the build noted it."""
    note = resources.files("bidistill_kernels") / "build.txt"
    if not note.is_file():
        return "these are sources that were not installed; run pip install"
    return f"this is a pure Python install ({note.read_text().strip()})"

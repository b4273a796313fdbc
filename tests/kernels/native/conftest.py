"""Fixtures of the native back-end: the library, and every instruction set that can run here."""

import pytest

from bidistill_kernels._native.library import load

ISAS = ("scalar", "avx2", "avx512", "neon")


@pytest.fixture(scope="session")
def library():
    native = load()
    if native.library is None:
        pytest.skip(f"the native library is {native.reason}")
    return native.library


@pytest.fixture(params=ISAS)
def isa(request, library):
    """Each instruction set; the one that was in use afterwards."""
    before = library.bd_isa()
    if library.bd_set_isa(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    assert library.bd_isa().decode() == request.param
    yield request.param
    assert library.bd_set_isa(before) == 0

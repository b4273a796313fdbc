"""Fixtures of the kernel tests: every back-end that can run here."""

import warnings

import pytest

from bidistill_kernels._native.library import load
from tests.kernels.cases import BACKENDS, DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each back-end; Triton's runs in its interpreter where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the Triton back-end needs Triton")
    if request.param == "native" and DEVICE.type != "cpu":
        pytest.skip("the native back-end is for CPU tensors")
    if request.param == "native" and load().library is None:
        pytest.skip(f"the native library is {load().reason}")
    with warnings.catch_warnings():
        # lanes beyond a row's end hold -inf: NumPy, which interprets the kernels, warns of them
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        warnings.filterwarnings("ignore", message="(invalid value|divide by zero|overflow)")
        yield request.param

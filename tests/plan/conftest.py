"""One folder of models and data for all tests of the planner, and memory as PyTorch gives it."""

import pytest
from torch.utils import _device


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """In place of that of all tests: the functions that it replaces make no tensors on meta."""
    _device._device_constructors.cache_clear()  # it may have met the replaced ones
    yield
    _device._device_constructors.cache_clear()

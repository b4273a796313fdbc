"""Fixtures of all tests: fixed seeds, and memory nobody wrote to that shows."""

import os
import random
import sys

import pytest
import torch

# read when the kernels are first imported: without a GPU they run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeds():
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_memory(monkeypatch):
    """Fill what the kernel package allocates with NaN: an entry it forgets to write fails.

    Fresh memory is often zero, which many a wrong result would be taken for.
    """

    def filling(allocate):
        def allocate_nan(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller.startswith("bidistill_kernels") and tensor.is_floating_point()
            return tensor.fill_(torch.nan) if ours else tensor

        return allocate_nan

    monkeypatch.setattr(torch, "empty", filling(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filling(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filling(torch.Tensor.new_empty))

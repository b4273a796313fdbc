"""Products with the head in 16 bits, where no accelerator makes them fp32.

The shapes are those of N rows whose gradients all have one sign, the worst for a narrow exponent.
"""

import pytest
import torch

from bidistill_kernels import _products
from tests.kernels.cases import DEVICE
from tests.support import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1 / 8192, 3.0])
def test_weight_gradient(dtype, scale):
    """In fp16 the sum of 8192 rows overflows before it is divided by 8192."""
    gradient = -torch.rand(8192, 8, device=DEVICE).to(dtype)
    hidden = torch.full((8192, 2), 20.0, device=DEVICE).to(dtype)
    weight = torch.full((8192,), scale / 8, device=DEVICE)
    expected = gradient.double().T @ (hidden.double() * weight[:, None])
    actual = _products.weight_gradient(gradient, hidden, weight, dtype)
    own = gradient.float().T @ (hidden.float() * weight[:, None])
    assert_close("dW", actual, expected, own.to(dtype))
    total = torch.zeros(8, 2, device=DEVICE)
    _products.add_weight_gradient(gradient, hidden, weight, total)
    # the scaled hidden states were rounded to 16 bits
    torch.testing.assert_close(total.double(), expected, rtol=5e-3, atol=0)


def test_nothing_to_multiply():
    empty = torch.empty(0, 8, device=DEVICE, dtype=torch.float16)
    weight = torch.empty(0, device=DEVICE)
    assert not _products.weight_gradient(empty, empty[:, :2], weight, torch.float16).any()

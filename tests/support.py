"""The one assert function for numbers, which has no switch that makes it lenient; and what makes
whole models exact enough to compare with."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# PyTorch's own error in each dtype, where the case at hand happens to show less
OWN_ERROR = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1.6e-3,
    torch.bfloat16: 1.2e-2,
}


def assert_close(name: str, actual: Tensor, expected64: Tensor, torch_own: Tensor) -> float:
    """Assert an error of at most twice PyTorch's own in the same dtype, over max |expected64|.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        expected64: the same computed in float64.
        torch_own: the same computed by plain PyTorch in the dtype under test.

    Returns:
        The largest error, relative to max |expected64|.
    """
    assert actual.shape == expected64.shape, f"{name}: {actual.shape}, not {expected64.shape}"
    assert actual.dtype == torch_own.dtype, f"{name}: {actual.dtype}, not {torch_own.dtype}"
    odd = ~expected64.isfinite()  # infinities and NaNs must sit where the reference has them
    torch.testing.assert_close(actual[odd].double(), expected64[odd], equal_nan=True, msg=name)
    if not expected64[~odd].any():
        assert not actual[~odd].any(), f"{name}: the reference is exactly zero, the result is not"
        return 0.0
    scale = expected64[~odd].abs().max()
    own = ((torch_own.double() - expected64) / scale).masked_fill(odd, 0).abs().max().item()
    error = ((actual.double() - expected64) / scale).masked_fill(odd, 0).abs()
    bound = 2 * max(own, OWN_ERROR[actual.dtype])
    assert bound < 0.05, f"{name}: bound {bound:.1e} would let a 5 % scale error pass"
    at, worst = int(error.argmax()), error.max().item()  # a NaN counts as the maximum and fails
    values = f"got {actual.flatten()[at]:.6g}, expected {expected64.flatten()[at]:.6g}"
    assert worst <= bound, f"{name}: error {worst:.2e}, bound {bound:.2e}, at {at}: {values}"
    return worst


class Wide(TorchFunctionMode):
    """Casts to fp32 go to fp64 inside: transformers' norms, rotary angles and softmax do them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(wide, args), **kwargs)

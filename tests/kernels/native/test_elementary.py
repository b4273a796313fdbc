"""Errors of the elementary functions, over float32 from end to end, in each instruction set."""

import math

import pytest
import torch

from bidistill_kernels._native.library import call

# every 997th float32, by its bits: a prime, so that all mantissas and exponents occur
STEP = 997


def floats(low: float, high: float, step: int = STEP) -> torch.Tensor:
    """Every `step`-th float32 in [low, high], and both ends."""
    parts = []
    for sign in (-1, 1):
        ends = [max(0.0, sign * x) for x in (low, high)]
        if not any(ends):
            continue
        first, last = (torch.tensor(x).view(torch.int32).item() for x in sorted(ends))
        parts.append(
            sign * torch.arange(first, last + 1, step, dtype=torch.int32).view(torch.float32)
        )
    return torch.cat([*parts, torch.tensor([low, high])])


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    call("bd_elementary_f32", name.encode(), x.data_ptr(), len(x), out.data_ptr())
    return out


def ulps(actual: torch.Tensor, expected64: torch.Tensor) -> torch.Tensor:
    """Error in units of the last place of the expected value."""
    exponent = torch.frexp(expected64).exponent.clamp(min=-125).double()
    return (actual.double() - expected64).abs() / torch.exp2(exponent - 24)


def remainder64(x: torch.Tensor) -> torch.Tensor:
    """e^x - 1 - x in float64, by its series where the difference would cancel."""
    x = x.double()
    term, total = x * x / 2, torch.zeros_like(x)
    for k in range(3, 20):
        total, term = total + term, term * x / k
    return torch.where(x.abs() < 0.5, total, x.expm1() - x)


# name: exact function, range, bound in ulps
FUNCTIONS = {
    "exp": (torch.exp, (-87.33, 88.0), 1.25),
    "expm1": (torch.expm1, (-87.33, 0.0), 1.0),
    "exp_remainder": (remainder64, (-87.33, 0.0), 7.0),
    "log1p": (torch.log1p, (-0.999, 0.0), 2.75),
    "log": (torch.log, (2.0**-126, 3.4e38), 2.75),
    "tanh": (torch.tanh, (-20.0, 20.0), 1.75),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error(isa, name):
    exact, ends, bound = FUNCTIONS[name]
    x = floats(*ends)
    assert len(x) > 1_000_000
    error = ulps(apply(name, x), exact(x.double()))
    at = int(error.argmax())
    assert error[at] <= bound, f"{error[at]:.2f} ulp at {x[at]:.9g}"


def test_the_measure_sees_an_ulp():
    x = torch.tensor([1.0, 3.0, 1e-30])
    assert ulps(torch.nextafter(x, torch.tensor(9.0)), x.double()).tolist() == [1, 1, 1]


def test_exp_beyond_its_range(isa):
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -1e30, -88.0, -87.4, nan, -0.0, 0.0])
    torch.testing.assert_close(
        apply("exp", x), torch.tensor([0, 0, 0, 0, nan, 1, 1.0]), rtol=0, atol=0, equal_nan=True
    )


def test_decay_beyond_its_range(isa):
    inf, nan = math.inf, math.nan
    x = torch.tensor([-inf, -1e30, -200.0, nan, -0.0])
    expected = torch.tensor([-1, -1, -1, nan, 0])
    torch.testing.assert_close(apply("expm1", x), expected, rtol=0, atol=0, equal_nan=True)
    expected = torch.tensor([inf, 1e30, 199, nan, 0])
    torch.testing.assert_close(apply("exp_remainder", x), expected, rtol=0, atol=0, equal_nan=True)


def test_tanh_beyond_its_range(isa):
    x = torch.tensor([-math.inf, -1e30, 1e30, math.inf, math.nan, -0.0, 1e-40])
    expected = torch.tensor([-1, -1, 1, 1, math.nan, -0.0, 1e-40])
    torch.testing.assert_close(apply("tanh", x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["log1p", "log"])
def test_logarithm_of_nan(isa, name):
    assert apply(name, torch.tensor([math.nan])).isnan().all()


def test_log_below_its_range(isa):
    y = apply("log", torch.tensor([0.0, 1e-45, 1e-40, 1.1e-38]))
    assert ((y > -89) & (y < -87)).all()

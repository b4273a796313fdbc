"""`assert_close` accepts rounding and rejects every wrong answer seen to pass elsewhere."""

import pytest
import torch

from tests.support import assert_close

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def good():
    # gradients of a mean over 1,024 rows are this small: a fixed tolerance would swallow them
    return torch.randn(7, 7, dtype=torch.float64) / 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_rounding(dtype):
    expected = good()
    assert assert_close("good", expected.to(dtype), expected, expected.to(dtype)) < 1e-2


def one_wrong(x):
    wrong = x.clone()
    wrong[3, 4] += x.abs().max() * 0.05
    return wrong


def one_odd(value):
    def change(x):
        wrong = x.clone()
        wrong[2, 2] = value
        return wrong

    return change


WRONG = {
    "zeros": torch.zeros_like,
    "scaled": lambda x: x * 1.05,
    "one element": one_wrong,
    "transposed": lambda x: x.T.contiguous(),
    "nan": one_odd(torch.nan),
    "infinity": one_odd(torch.inf),
    "shape": lambda x: x[:, :6],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_rejects_wrong_answers(change, dtype):
    expected = good()
    with pytest.raises(AssertionError):
        assert_close("wrong", change(expected).to(dtype), expected, expected.to(dtype))


def test_rejects_another_dtype():
    expected = good()
    with pytest.raises(AssertionError, match="float64"):
        assert_close("wrong", expected, expected, expected.float())


@pytest.mark.parametrize("actual", [[0.0, 1.0], [torch.inf, torch.inf], [-torch.inf, 1.0]])
def test_rejects_a_misplaced_infinity(actual):
    expected = torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close("wrong", torch.tensor(actual), expected, expected.float())


def test_accepts_infinity_and_nan_in_place():
    expected = torch.tensor([torch.inf, torch.nan, 1.0], dtype=torch.float64)
    assert assert_close("good", expected.float(), expected, expected.float()) == 0


def test_rejects_noise_on_exact_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    assert assert_close("good", zero.float(), zero, zero.float()) == 0
    with pytest.raises(AssertionError, match="exactly zero"):
        assert_close("wrong", torch.tensor([0.0, 1e-30, 0.0]), zero, zero.float())


def test_rejects_a_bound_that_is_too_wide():
    expected = good()
    with pytest.raises(AssertionError, match="5 %"):
        assert_close("wide", expected.float(), expected, (expected * 1.04).float())

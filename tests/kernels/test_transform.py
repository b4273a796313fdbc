"""Logit transform: order of its steps and its derivative; chain rule in test_lm_head.py."""

import pytest
import torch

from bidistill_kernels import LogitTransform

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.5),
    LogitTransform(softcap=3.0),
    LogitTransform(2.0, 3.0, 0.7, 4),
]


def test_order():
    raw = torch.tensor([[1.0, -2.0, 9.0]])
    expected = 3 * torch.tanh(2 * raw[:, :2] / 3) / 0.5
    torch.testing.assert_close(LogitTransform(2.0, 3.0, 0.5, 2)(raw), expected)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_call_and_derivative(transform):
    raw = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    before = raw.detach().clone()
    final = transform(raw)
    assert torch.equal(raw, before)
    (slope,) = torch.autograd.grad(final.sum(), raw)
    expected = torch.full_like(final, transform.factor)
    if transform.softcap is not None:
        expected = expected * transform.slope(final)
    torch.testing.assert_close(slope[:, : final.shape[1]], expected)
    assert not slope[:, final.shape[1] :].any()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_pack_round_trip(transform):
    assert LogitTransform.unpack(transform.pack()) == transform

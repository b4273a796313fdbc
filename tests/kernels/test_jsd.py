"""Generalised Jensen-Shannon divergence of existing logits; fused form in test_lm_head.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import bidirectional_kl_reference, jsd, jsd_reference
from tests.support import assert_close

inf = torch.inf
BETAS = pytest.mark.parametrize("beta", [0.5, 0.1, 0.9])


def rows(student, teacher, **options):
    return jsd(student, teacher, reduction="none", **options)


@BETAS
def test_reference_matches_definition(beta):
    # p = (3/4, 1/4), q = (1/2, 1/2), by hand
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    m = [beta * p + (1 - beta) * 0.5 for p in (0.75, 0.25)]
    expected = beta * sum(p * math.log(p / u) for p, u in zip((0.75, 0.25), m, strict=True))
    expected += (1 - beta) * sum(0.5 * math.log(0.5 / u) for u in m)
    loss = jsd_reference(student, teacher, beta=beta)
    torch.testing.assert_close(loss, torch.tensor([expected]))


@BETAS
def test_gradcheck(beta):
    s = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: jsd_reference(s, t, beta=beta), s)
    assert torch.autograd.gradcheck(lambda s: rows(s, t, beta=beta), s)


@BETAS
def test_accurate_where_the_models_nearly_agree(beta):
    s = torch.randn(20, 4000) * 6
    t = s + torch.randn(20, 4000) * 2e-3
    expected = jsd_reference(s.double(), t.double(), beta=beta)

    def error(actual):
        return ((actual.double() - expected) / expected).abs().max().item()

    assert expected.max() < 2e-6
    assert error(rows(s, t, beta=beta)) < 2e-3 < 2e-2 < error(jsd_reference(s, t, beta=beta))


properties = settings(derandomize=True, max_examples=15, deadline=None)
seeds, betas = st.integers(0, 2**31), st.floats(0.02, 0.98)


def draw(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 31, generator=g, dtype=torch.float64) * 5 for _ in range(2)]


@properties
@given(seeds, betas)
def test_bounds_and_zero_for_equal_models(seed, beta):
    s, t = draw(seed)
    loss = rows(s, t, beta=beta)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (loss >= 0).all()
    assert (loss <= entropy + 1e-9).all()
    s = s.float().requires_grad_()
    same = rows(s, s.detach().clone(), beta=beta)
    assert not same.any()
    assert not torch.autograd.grad(same.sum(), s)[0].any()


@properties
@given(seeds, betas, st.floats(-50, 50))
def test_invariances(seed, beta, constant):
    s, t = draw(seed)
    expected = rows(s, t, beta=beta)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rows(s + constant, t - constant, beta=beta), expected)
    torch.testing.assert_close(rows(s[:, order], t[:, order], beta=beta), expected)
    # the models change places together with their shares
    torch.testing.assert_close(rows(t, s, beta=1 - beta), expected)


def test_scaled_ends_are_the_divergences():
    s, t = (logits / 5 for logits in draw(3))
    for beta, weights in ((1e-5, (1.0, 0.0)), (1 - 1e-5, (0.0, 1.0))):
        forward, reverse = weights
        kl = bidirectional_kl_reference(s, t, forward=forward, reverse=reverse)
        scaled = rows(s, t, beta=beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, kl, rtol=1e-3, atol=0)


@BETAS
def test_edges(beta):
    s, t = torch.randn(5, 8), torch.randn(5, 8)
    s[0, 3], s[1, 4] = 1e4, -1e4
    t[2, 2] = -inf  # ruled out by the teacher
    s[3, 5] = -inf  # by the student
    s[4, 6] = t[4, 6] = -inf  # by both
    s64 = s.double().requires_grad_()
    expected = jsd_reference(s64, t.double(), beta=beta)
    assert expected.isfinite().all()
    loss = rows(s.requires_grad_(), t, beta=beta)
    assert_close("loss", loss, expected, jsd_reference(s, t, beta=beta))
    (gradient,) = torch.autograd.grad(loss[:3].sum(), s)
    (wanted,) = torch.autograd.grad(expected[:3].sum(), s64)
    # (autograd of the reference itself has 0 * inf = NaN where the student rules an id out)
    assert_close("gradient", gradient[:3], wanted[:3], wanted[:3].float())
    (gradient,) = torch.autograd.grad(rows(s, t, beta=beta).sum(), s)
    assert gradient.isfinite().all()
    assert gradient[3, 5] == 0
    assert gradient[4, 6] == 0


@pytest.mark.parametrize("side", [0, 1])
def test_an_input_nan_is_not_hidden(side):
    sides = [torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)]
    with torch.no_grad():
        sides[side][0, 3] = torch.nan
    loss = jsd(*sides, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), sides[0])
    assert gradient.isnan().all(-1).tolist() == [True, False]

"""BiLD: the definition, invariances, ties and edges; the fused form also in test_lm_head.py."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill_kernels import LogitTransform
from bidistill_kernels.bild import LinearBiLD, bild, bild_reference, linear_bild
from tests.kernels.cases import make_inputs
from tests.support import assert_close

inf = torch.inf
V = 30


def rows(student, teacher, **options):
    return bild(student, teacher, reduction="none", **options)


def draw(seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, V, generator=g, dtype=torch.float64) * spread for _ in range(2)]


def gradient(student, teacher, loss=rows, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher, **options).sum(), student)[0]


def chosen(logits, k):
    """Mask of the k largest, by a full sort."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, value=True)


def kl(p, q):
    """KL divergence of the softmaxes of two lists."""
    p, q = ([math.exp(x) for x in z] for z in (p, q))
    pairs = [(x / sum(p), y / sum(q)) for x, y in zip(p, q, strict=True)]
    return sum(x * math.log(x / y) for x, y in pairs)


def test_reference_matches_definition():
    """By hand: the teacher ranks ids 0, 2, 1, the student 3, 2, 1; temperature 2."""
    s, t = [0.0, 1.0, 2.0, 5.0], [6.0, 1.0, 3.0, 0.0]
    # differences at ids (0, 2), (0, 1), (2, 1), then (3, 2), (3, 1), (2, 1), over 2
    expected = kl([1.5, 2.5, 1.0], [-1.0, -0.5, 0.5]) + kl([-1.5, -0.5, 1.0], [1.5, 2.0, 0.5])
    loss = bild_reference(torch.tensor([s]), torch.tensor([t]), k=3, temperature=2.0)
    torch.testing.assert_close(loss, torch.tensor([expected]))


@pytest.mark.parametrize("k", [2, 5, V, 2 * V])
def test_every_pair_written_out(k):
    s, t = draw(1)
    expected = []
    for s_row, t_row in zip(s.tolist(), t.tolist(), strict=True):
        total = 0.0
        for leader in (t_row, s_row):
            best = sorted(range(V), key=lambda i: -leader[i])[:k]
            pairs = list(combinations(best, 2))
            total += kl(*([(z[a] - z[b]) / 3 for a, b in pairs] for z in (t_row, s_row)))
        expected.append(total)
    expected = torch.tensor(expected, dtype=s.dtype)
    torch.testing.assert_close(bild_reference(s, t, k=k), expected)
    torch.testing.assert_close(rows(s, t, k=k), expected)


@pytest.mark.parametrize("k", [2, 6])
def test_gradcheck(k):
    s, t = draw(1)
    s.requires_grad_()
    options = {"k": k, "temperature": 1.7}
    assert torch.autograd.gradcheck(lambda s: bild_reference(s, t, **options), s)
    assert torch.autograd.gradcheck(lambda s: rows(s, t, **options), s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_with_transform_and_bias(backend, dtype):
    inputs = make_inputs(7, 300).to(dtype)
    x, w, y, v, target = inputs
    bias = torch.randn(300, device=x.device).to(dtype).requires_grad_()
    transform = LogitTransform(scale=1.3, softcap=9.0, temperature=1.5, vocab_limit=290)
    options = {"k": 6, "temperature": 2.0}
    loss = linear_bild(
        *inputs,
        student_bias=bias,
        student_transform=transform,
        teacher_transform=LogitTransform(vocab_limit=290),
        backend=backend,
        reduction="sum",
        **options,
    )
    got = [loss, *torch.autograd.grad(loss, (x, w, bias))]

    def eager(dtype):
        x64, w64, b64 = (a.detach().to(dtype).requires_grad_() for a in (x, w, bias))
        student = transform(x64 @ w64.T + b64)
        teacher = (y.to(dtype) @ v.to(dtype).T)[:, :290]
        total = bild_reference(student, teacher, **options)[target != -100].sum()
        return [total, *torch.autograd.grad(total, (x64, w64, b64))]

    results = zip(
        ("loss", "dX", "dW", "dbias"), got, *map(eager, (torch.float64, torch.float32)), strict=True
    )
    for name, actual, expected64, own in results:
        assert_close(name, actual, expected64, own.to(actual.dtype))


def test_module():
    inputs = make_inputs(5, 20).to(torch.float32)
    module = LinearBiLD(k=3)
    assert torch.equal(module(*inputs), linear_bild(*inputs, k=3))
    assert "k=3" in repr(module)


def test_accurate_where_the_models_nearly_agree():
    s = torch.randn(20, 400) * 6
    t = s + torch.randn(20, 400) * 2e-3
    expected = bild_reference(s.double(), t.double())

    def error(actual):
        return ((actual.double() - expected) / expected.mean()).abs().max().item()

    assert expected.max() < 2e-6
    assert error(rows(s, t)) < 2e-3 < 2e-2 < error(bild_reference(s, t))


# --- invariants ---------------------------------------------------------------------------

properties = settings(derandomize=True, max_examples=15, deadline=None)
seeds, ks = st.integers(0, 2**31), st.integers(2, V)


@properties
@given(seeds, ks)
def test_never_negative_and_zero_for_equal_models(seed, k):
    s, t = draw(seed)
    assert (rows(s, t, k=k) >= 0).all()
    assert not rows(s, s.clone(), k=k).any()
    assert not gradient(s, s.clone(), k=k).any()


@properties
@given(seeds, ks, st.floats(-50, 50))
def test_invariances(seed, k, constant):
    s, t = draw(seed)
    expected = rows(s, t, k=k)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    # unlike raw logits: a constant on one side alone changes nothing
    torch.testing.assert_close(rows(s + constant, t, k=k), expected)
    torch.testing.assert_close(rows(s, t + constant, k=k), expected)
    torch.testing.assert_close(rows(s[:, order], t[:, order], k=k), expected)
    # the temperature is a unit of the logits, and nothing is multiplied by its square
    torch.testing.assert_close(rows(s * 2, t * 2, k=k, temperature=6.0), expected)
    tempered = {f"{side}_transform": LogitTransform(temperature=3.0) for side in PAIR}
    torch.testing.assert_close(rows(s, t, k=k, temperature=1.0, **tempered), expected)


PAIR = ("student", "teacher")


@properties
@given(seeds, st.integers(2, 9))
def test_gradient_support(seed, k):
    s, t = draw(seed)
    got = gradient(s, t, k=k)
    union = chosen(t, k) | chosen(s, k)
    assert not got[~union].any()
    # two ids have one pair and one outcome
    assert got.any() == (k > 2)
    # only differences count
    torch.testing.assert_close(got.sum(-1), torch.zeros(5, dtype=s.dtype))


@properties
@given(seeds, st.integers(2, 12))
def test_ties_are_ordered_by_id(seed, k):
    """A pair of ids that tie for their leader still has a sign in the other model."""
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randint(4, (6, 12), generator=g).double() for _ in range(2))
    torch.testing.assert_close(rows(s, t, k=k), bild_reference(s, t, k=k))
    expected = gradient(s, t, bild_reference, k=k)
    torch.testing.assert_close(gradient(s, t, k=k), expected)


# --- edges --------------------------------------------------------------------------------


def test_masked_ids():
    s, t = draw(9)
    s[0, :26] = t[0, :26] = -inf  # four ids are left, fewer than k
    s[1, t[1].argmax()] = -inf  # by the student alone
    t[2, s[2].argmax()] = -inf  # by the teacher alone
    s[3, 1:] = -inf  # one id is left: no pair
    s[4, 3:], t[4, :3] = -inf, -inf  # none in common
    loss = rows(s, t, k=6)
    torch.testing.assert_close(loss, bild_reference(s, t, k=6))
    assert loss.isfinite().all()
    assert loss.ne(0).tolist() == [True, True, True, False, False]
    got = gradient(s, t, k=6)
    torch.testing.assert_close(got, gradient(s, t, bild_reference, k=6))
    assert not got[s.isneginf() | t.isneginf()].any()
    # as if the masked ids had never been there
    torch.testing.assert_close(loss[0], rows(s[:1, 26:], t[:1, 26:], k=6)[0])


def test_logits_of_ten_thousand():
    s, t = draw(10)
    s[0, 3], s[1, 4], t[2, 5] = 1e4, -1e4, 1e4
    s, t = s.float(), t.float()
    expected = bild_reference(s.double(), t.double())
    assert_close("loss", rows(s, t), expected, bild_reference(s, t))
    wanted = gradient(s.double(), t.double(), bild_reference)
    own = gradient(s, t, bild_reference)
    assert_close("gradient", gradient(s, t), wanted, own)
    # better than the plain form: a difference of 1e4 has no digits left for the others
    assert_close("gradient", gradient(s, t), wanted, wanted.float())


def test_one_id():
    s, t = torch.randn(3, 1), torch.randn(3, 1)
    assert not rows(s, t).any()
    assert not gradient(s, t).any()


def test_an_input_nan_is_not_hidden():
    s, t = torch.randn(2, 20), torch.randn(2, 20)
    t[0, 3] = torch.nan
    assert rows(s, t).isnan().tolist() == [True, False]


REJECTED = {
    "one id": ({"k": 1}, ValueError, "k: got 1"),
    "fraction": ({"k": 2.5}, TypeError, "k: .*whole"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
}


@pytest.mark.parametrize(("options", "error", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects(options, error, message):
    inputs = make_inputs(3, 9)
    with pytest.raises(error, match=message):
        linear_bild(*inputs, **options)
    with pytest.raises(error, match=message):
        bild(inputs.student_weight, inputs.student_weight, **options)

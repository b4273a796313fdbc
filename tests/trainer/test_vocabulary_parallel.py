"""A loss of a head that is shared out among ranks equals the loss of the whole head.

97 ids are cut unevenly by 2 and by 4 ranks. The reference is one process with the whole head; in
fp32 it is fp64 arithmetic on full logits, as in the kernel tests.
"""

import pytest
import torch

from bidistill_kernels import LogitTransform
from tests.kernels import parts
from tests.kernels.parts import Call
from tests.support import assert_close

LOSSES = ("forward_kl", "reverse_kl", "kl_and_ce", "jsd", "jsd_0.1", "cross_entropy")
EXACT = 1e-12
"""Of fp64: sums are taken in another order."""
CAPPED = LogitTransform(scale=1.5, softcap=8.0, temperature=2.0, vocab_limit=90)

each_size = pytest.mark.parametrize("size", [2, 4])


def together(ranks, size, calls):
    """What the ranks found of each call, put together."""
    found = ranks(size).run(parts.outcomes, calls)
    return [parts.joined(list(of_each)) for of_each in zip(*found, strict=True)]


def assert_exact(found, expected, what):
    assert found.keys() == expected.keys(), what
    for name, right in expected.items():
        assert found[name].shape == right.shape, (what, name)
        assert found[name].isfinite().all(), (what, name)
        assert (found[name] - right).norm() <= EXACT * right.norm(), (what, name)


VARIANTS = {
    "mean": {},
    "sum": {"options": {"reduction": "sum"}},
    "none": {"options": {"reduction": "none"}},
    "num_items": {"options": {"num_items": 7.0}},
    "bias": {"bias": True},
    "bias, none": {"bias": True, "options": {"reduction": "none"}},
    "transform": {"transform": CAPPED},
    "bias, transform, none": {
        "bias": True,
        "transform": CAPPED,
        "options": {"reduction": "none"},
    },
    "bias, limit that leaves ranks without ids": {
        "bias": True,
        "transform": LogitTransform(vocab_limit=23, softcap=9.0),
    },
    "token weights": {"weigh": True},
    "token weights, none": {"weigh": True, "options": {"reduction": "none"}},
    "several chunks": {"N": 33, "options": {"chunk_bytes": 5000}},
    "one row a chunk": {"options": {"chunk_bytes": 1, "reduction": "none"}},
    "one head": {"shared": True},
    "frozen head": {"frozen": ("weight",)},
    "frozen head, trained bias": {"bias": True, "frozen": ("weight",)},
    "head alone": {"frozen": ("hidden",)},
    "no row": {"N": 0},
    "no row, none": {"N": 0, "options": {"reduction": "none"}},
    "ignored": {"ignore": True},
    "ignored, none": {"ignore": True, "bias": True, "options": {"reduction": "none"}},
    "fewer ids than shares": {"V": 5},
}


@each_size
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_whole_loss(ranks, size, variant):
    calls = [Call(loss, **variant) for loss in LOSSES]
    for call, found in zip(calls, together(ranks, size, calls), strict=True):
        assert_exact(found, parts.outcome(call), call)


@pytest.mark.parametrize("cuts", [(0, 1, 50, 50, 97), (0, 0, 0, 97, 97)])
def test_any_cuts(ranks, cuts):
    calls = [
        Call(loss, cuts=cuts, bias=bias, options={"reduction": reduction})
        for loss, bias, reduction in zip(
            LOSSES * 2, (True, False, False) * 4, ("none", "mean") * 6, strict=True
        )
    ]
    for call, found in zip(calls, together(ranks, 4, calls), strict=True):
        assert_exact(found, parts.outcome(call), call)


@each_size
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_single_precision(ranks, size, shared, loss):
    call = Call(loss, N=40, shared=shared, options={"reduction": "sum"})
    single = call._replace(dtype=torch.float32)
    (found,) = together(ranks, size, [single])
    expected, own = parts.eager(call), parts.eager(single)
    for name, right in expected.items():
        assert_close(name, found[name], right, own[name])


@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_whole_model_under_fsdp_and_tensor_parallelism(ranks, loss):
    expected = parts.step(Call(loss), two=False)
    for found in ranks(4).run(parts.step, Call(loss), True):
        assert_exact(found, expected, loss)


@each_size
def test_cuts_are_those_of_dtensors(ranks, size):
    assert all(ranks(size).run(parts.cuts_agree, [97, 96, 5, 2, 1]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", LOSSES[2:])
def test_second_backward(ranks, loss, reduction):
    call = Call(loss, options={"reduction": reduction})
    for first, second, third in ranks(2).run(parts.again, call):
        for once, twice in zip(first, second, strict=True):
            assert once.any()
            torch.testing.assert_close(twice, 2 * once)
        assert "second derivative" in third


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradient(ranks, loss):
    expected = parts.outcome(Call(loss))["loss"]
    for requires_grad, found in ranks(2).run(parts.without_gradient, Call(loss)):
        assert not requires_grad
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES[2:])
def test_gradient_of_logits_in_16_bits(ranks, loss):
    """Where an accelerator multiplies 16-bit operands into fp32; the same arithmetic here."""
    for found, wide in ranks(2).run(parts.halves, loss):
        for name in ("hidden", "weight"):
            error = (found[name] - wide[name]).double().norm() / wide[name].double().norm()
            assert 0 < error < 5e-3, name


def test_a_target_that_does_not_exist_makes_its_row_nan(ranks):
    for losses in ranks(2).run(parts.targets_of_nobody):
        for loss in losses:
            assert loss.isnan().tolist() == [True, False, True, True]


REFUSED = {
    "push-pull": "ValueError: vocab_parallel: got one with a loss of chosen ids",
    "BiLD": "ValueError: vocab_parallel: got one with a loss of chosen ids",
    "top-K KL": "ValueError: vocab_parallel: got one with a loss of chosen ids",
    "probabilities": "ValueError: vocab_parallel: got one with a loss of chosen ids or of given",
    "rows": "ValueError: student_weight: got 4 rows, expected 5, the ids from",
    "teacher's rows": "ValueError: teacher_weight: got 4 rows, expected 5",
    "bias": "ValueError: student_bias: got shape (10,), expected (5,)",
    "limit": "ValueError: teacher_weight: got a vocabulary of 4, expected the student's 10",
    "backend": "ValueError: backend: got 'native' with vocab_parallel",
    "logits": "ValueError: vocab_parallel: got one beside student_logits",
    "type": "TypeError: vocab_parallel: got tuple, expected a VocabParallel",
    "cuts": "ValueError: cuts: got (0, 10), expected 3 rising numbers",
    "falling cuts": "ValueError: cuts: got (0, 11, 10), expected 3 rising numbers",
    "columns": "ValueError: weight: got placements (Shard(dim=1),)",
    "DTensor": "TypeError: student_weight: got a DTensor",
}


def test_refuses(ranks):
    for said in ranks(2).run(parts.refusals):
        assert said.keys() == REFUSED.keys()
        for name, message in REFUSED.items():
            assert said[name].startswith(message), said[name]
            assert "\n" not in said[name]


@pytest.mark.parametrize("loss", ["kl_and_ce", "jsd", "cross_entropy"])
def test_memory_is_a_chunk_of_local_logits(ranks, loss):
    V, few, many, chunk_bytes = 4096, 256, 1024, 1 << 19
    for small, large in ranks(2).run(parts.peaks, loss, (few, many), V, chunk_bytes):
        # no N x V: only rows of the hidden states, some copies of them, and numbers a row
        assert large - small < (many - few) * 4 * (5 * 16 + 12 + 16)
        assert large - small < (many - few) * V // 2 / 4
        # the chunk, temporaries and dW; the last two are a few MB here
        assert small < 4 * chunk_bytes + 3 * 4 * (V // 2) * 16


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_a_compiled_function(ranks, reduction):
    call = Call("kl_and_ce", options={"reduction": reduction})
    for found, expected in ranks(2).run(parts.compiled, call):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

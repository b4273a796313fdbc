"""Attention alone against its definition, in fp64; whole models against separate, eager runs.

Whole models run in fp32 and, with what transformers casts to fp32 kept wide, in fp64. The
configurations cover what differs between models: grouped heads (llama), normed queries and a
head width of its own (qwen3), layers with and without a sliding window (gemma3). The window of 4 is
shorter than the shared prefix of 6 and than the longest sequences, so it cuts inside each of them.
"""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bidistill.attention import NAME, packed_attention, register, use_packed_attention
from bidistill.data.packing import Segment, pack
from bidistill.data.views import View
from bidistill.errors import UserError
from tests.support import Wide, assert_close

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "one head each": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **WINDOWS)),
}
PREFIX = (5, 6, 7, 8, 9, 10)
SEQUENCES = [
    (View((*PREFIX, 20, 21, 22), "a"), (30, 31, 32)),
    (View((40, 41, 42, 43, 44, 45), "alone"), (33, 34)),
    (View((*PREFIX, 23), "a"), (35,)),
    (View((*PREFIX, 24, 25, 26), "a"), (36, 37, 38)),  # as long as the first
    (View((50, 51, 52), "b"), (39,)),
    (View((50, 51, 53, 54, 55, 56, 57), "b"), ()),
]


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def packed_rows(model, packed, **inputs):
    inputs = inputs or {"input_ids": packed.input_ids}
    with use_packed_attention(model):
        output = model.base_model(
            **inputs,
            position_ids=packed.position_ids,
            segments=packed.segments,
            use_cache=False,
        )
    return output.last_hidden_state[0, packed.rows]


def separate_rows(model, sequences, embed=None):
    rows = []
    for view, answer in sequences:
        ids = torch.tensor([view.prompt_ids + answer])
        inputs = {"input_ids": ids} if embed is None else {"inputs_embeds": embed(ids)}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        first = len(view.prompt_ids) - 1
        rows.append(hidden[first : first + len(answer)])
    return torch.cat(rows)


def gradients(model, rows):
    torch.manual_seed(1)
    parameters = dict(model.base_model.named_parameters())
    upstream = torch.randn(rows.shape).to(rows.dtype)
    return dict(
        zip(parameters, torch.autograd.grad(rows, parameters.values(), upstream), strict=True)
    )


def error(actual, expected):
    """Largest error over the largest expected value."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def dense_attention(q, k, v, segments, window):
    """The definition: one mask over the whole pack, softmax, keys repeated for grouped heads."""
    seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for segment in segments:
        before = [*range(*(segment.prefix or (0, 0)))]
        for token in range(segment.start, segment.end):
            before.append(token)
            seen[token, before[-window:] if window else before] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@st.composite
def layouts(draw):
    """Groups of segments: alone, or with a prefix before them."""
    segments, end = [], 0
    for lengths in draw(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1, max_size=3)):
        prefix = None
        if draw(st.booleans()):
            prefix = (end, end := end + draw(st.integers(1, 9)))
            segments.append(Segment(*prefix, None))
        segments += [Segment(end, end := end + length, prefix) for length in lengths[:4]]
    return tuple(segments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.none() | st.integers(1, 20))
def test_attention_matches_its_definition(segments, heads, window):
    torch.manual_seed(0)
    shape = segments[-1].end, 5
    q, k, v = (
        torch.randn(1, n, *shape, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    expected = dense_attention(q, k, v, segments, window)
    actual, weights = packed_attention(
        torch.nn.Module(), q, k, v, None, segments=segments, sliding_window=window
    )
    assert weights is None
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(actual, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_scaling_and_dropout_are_honoured():
    torch.manual_seed(0)
    q, segments = torch.randn(1, 2, 6, 8), (Segment(0, 2, None), Segment(2, 6, (0, 2)))
    layer = torch.nn.Module()
    scaled, _ = packed_attention(layer, q, q, q, None, segments=segments, scaling=0.5)
    by_hand, _ = packed_attention(layer, q * 0.5 * 8**0.5, q, q, None, segments=segments)
    torch.testing.assert_close(scaled, by_hand)
    dropped, _ = packed_attention(layer, q, q, q, None, segments=segments, dropout=1.0)
    assert not dropped.any()


def test_equals_separate_runs(model):
    """Hidden states and gradients: at most twice the error that separate runs make themselves."""
    own = separate_rows(model, SEQUENCES)
    own_gradients = gradients(model, own)
    packed = packed_rows(model, pack(SEQUENCES))
    exact_model = deepcopy(model).double()
    with Wide():
        exact = separate_rows(exact_model, SEQUENCES)
        exact_gradients = gradients(exact_model, exact)
    assert_close("hidden states", packed, exact, own)
    for name, gradient in gradients(model, packed).items():
        assert_close(name, gradient, exact_gradients[name], own_gradients[name])


def test_equals_separate_runs_in_double_precision(model):
    """What fp32 would hide: one mask entry of little weight, or a reference that is not exact."""
    model = model.double()
    with Wide():
        packed, separate = packed_rows(model, pack(SEQUENCES)), separate_rows(model, SEQUENCES)
        expected = gradients(model, separate)
        actual = gradients(model, packed)
    assert error(packed, separate) < 1e-13
    for name, gradient in actual.items():
        assert error(gradient, expected[name]) < 1e-12, name


@pytest.mark.parametrize(
    "mistake",
    [
        lambda s: Segment(s.start, s.end, None),
        lambda s: s if s.start != 6 else Segment(s.start, s.end, None),
    ],
    ids=["no prefixes", "one prefix gone"],
)
def test_the_comparison_notices_a_mistake(model, mistake):
    packed = pack(SEQUENCES)
    assert packed.segments[1] == Segment(6, 7, (0, 6))
    wrong = [mistake(segment) for segment in packed.segments]
    with use_packed_attention(model):
        hidden = model.base_model(
            packed.input_ids, position_ids=packed.position_ids, segments=tuple(wrong)
        ).last_hidden_state[0, packed.rows]
    assert error(hidden, separate_rows(model, SEQUENCES)) > 1e-3


def test_gradient_reaches_the_shared_prefix(model):
    """The gradient at each prefix position is the sum over the sequences that look back at it."""
    torch.manual_seed(2)
    shared = [s for s in SEQUENCES if s[0].context == "a"]
    packed = pack(shared)
    table = torch.randn(61, 32, requires_grad=True)  # each prefix token is new
    inputs = table[packed.input_ids].detach().requires_grad_()
    upstream = torch.randn(len(packed.rows), 32)
    rows = packed_rows(model, packed, inputs_embeds=inputs)
    (actual,) = torch.autograd.grad(rows, inputs, upstream)
    (expected,) = torch.autograd.grad(
        separate_rows(model, shared, embed=lambda ids: table[ids]), table, upstream
    )
    assert packed.segments[0] == Segment(0, len(PREFIX), None)
    for position, token in enumerate(PREFIX):
        assert error(actual[0, position], expected[token]) < 1e-5


def test_a_sequence_sees_no_other(model):
    changed = [*SEQUENCES[:3], (View((*PREFIX, 27, 28, 29), "a"), (46, 47, 48)), *SEQUENCES[4:]]
    one, two = pack(SEQUENCES), pack(changed)
    assert one.segments == two.segments
    same = one.sequence != 3
    before, after = packed_rows(model, one), packed_rows(model, two)
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[~same], after[~same]).any()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_with_checkpointed_layers():
    model, packed = build("llama"), pack(SEQUENCES)
    expected = gradients(model, packed_rows(model, packed))
    model.train().gradient_checkpointing_enable()
    with use_packed_attention(model):  # backward computes the layers again, so it stays inside
        actual = gradients(model, packed_rows(model, packed))
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # from PEFT
def test_works_inside_peft():
    model, packed = build("gemma3"), pack(SEQUENCES)
    plain = packed_rows(model, packed)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with use_packed_attention(wrapped):
        assert model.config._attn_implementation == NAME
        hidden = wrapped.get_base_model().base_model(
            packed.input_ids, position_ids=packed.position_ids, segments=packed.segments
        )
    assert torch.equal(hidden.last_hidden_state[0, packed.rows], plain)  # a new adapter adds zero
    assert model.config._attn_implementation == "eager"


def test_restores_after_an_error():
    model = build("llama")
    with pytest.raises(RuntimeError, match="stop"), use_packed_attention(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "eager"


def test_training_after_inference_mode():
    """Masks are kept, and one that was made in inference mode must serve backward too."""
    model, sequences = build("qwen3"), [(View((*range(1, 38), n), "a"), (3,)) for n in (50, 51)]
    with torch.inference_mode():
        packed_rows(model, pack(sequences))
    gradients(model, packed_rows(model, pack(sequences)))


def test_register_twice():
    register()
    register()


def test_refuses_a_call_without_segments():
    model = build("llama")
    with (
        use_packed_attention(model),
        pytest.raises(ValueError, match=r"segments: got none, .*call"),
    ):
        model(torch.tensor([[1, 2, 3]]))


BAD_CALLS = {
    "too few": ({"segments": (Segment(0, 2, None),)}, "segments: got 2 tokens for queries"),
    "mask": ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask: got one, expected None"),
    "two rows": ({"q": torch.zeros(2, 4, 3, 8)}, r"queries \(2, 4, 3, 8\) .*expected one sequence"),
    "cache": ({"k": torch.zeros(1, 2, 5, 8)}, r"keys \(1, 2, 5, 8\), .*use_cache=False"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_refuses_calls(change, message):
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    call = {"q": q, "k": k, "v": k, "attention_mask": None, "segments": (Segment(0, 3, None),)}
    packed_attention(torch.nn.Module(), **call)
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.nn.Module(), **{**call, **change})


def test_refuses_a_soft_cap_on_scores():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()
    with pytest.raises(UserError, match="got attention with softcap, expected plain causal"):
        packed_rows(model, pack(SEQUENCES))


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_refuses_other_changes_of_the_scores(name):
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match=f"got attention with {name}"):
        packed_attention(
            torch.nn.Module(), q, q, q, None, segments=(Segment(0, 2, None),), **{name: q}
        )


def test_refuses_attention_that_looks_ahead():
    layer, q = torch.nn.Module(), torch.zeros(1, 1, 2, 8)
    layer.is_causal = False
    with pytest.raises(UserError, match="got attention with is_causal=False"):
        packed_attention(layer, q, q, q, None, segments=(Segment(0, 2, None),))


def test_refuses_layers_of_other_types():
    model = build("qwen3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with (
        pytest.raises(UserError, match="layers of type linear_attention, expected only full_att"),
        use_packed_attention(model),
    ):
        pass
    assert model.config._attn_implementation == "eager"

"""Our greedy loop against transformers' own, one prompt at a time, on tiny random models.

Prompts differ in length (padding), share a beginning (the prefix cache), and some end early (rows
leave the batch): each alone and all together.
"""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from bidistill.errors import UserError
from bidistill.evaluation.generation import generate, prompt_ids

PROMPTS = [
    ("Why?", ""),
    ("What is the capital of Zembla?", ""),
    ("What is the capital of Zembla?", "The capital of Zembla is"),
    ("x", "Ünï"),
    ("What is the capital of Gondor and of Rohan, if they have one at all?", "It"),
    ("Why?", ""),
    ("Where?", "In"),
]


def slow(model, tokenizer, prompts, max_new_tokens):
    """transformers' greedy answers, token by token: one prompt at a time, unpadded."""
    answers = []
    for question, prefill in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, question, prefill)])
        mask = torch.ones_like(ids)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def texts(tokenizer, answers, stop=()):
    return [tokenizer.decode([t for t in a if t not in stop]) for a in answers]


@pytest.fixture
def stopping(model, tokenizer):
    """A model whose rows end at different times, through the second of two stopping tokens."""
    model = model.double().eval()
    answers = slow(model, tokenizer, PROMPTS, 12)
    ends = {t: {a.index(t) for a in answers if t in a} for a in answers for t in a}
    often = max(ends, key=lambda token: len(ends[token]))
    assert len(ends[often]) > 2, "the rows should end at different times"
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, often]
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_equals_transformers(stopping, tokenizer, batch_size):
    expected = slow(stopping, tokenizer, PROMPTS, 12)
    assert 1 < min(map(len, expected)) + 1 < max(map(len, expected)) + 1
    stop = stopping.generation_config.eos_token_id
    assert generate(stopping, tokenizer, PROMPTS, 12, batch_size) == texts(
        tokenizer, expected, stop
    )


def test_equals_transformers_with_a_sliding_window(tokenizer):
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,  # shorter than the shared prefix
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Gemma3ForCausalLM(config).double().eval()
    assert generate(model, tokenizer, PROMPTS, 12) == texts(
        tokenizer, slow(model, tokenizer, PROMPTS, 12)
    )


def test_equals_transformers_for_qwen3(tokenizer):
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).double().eval()
    assert generate(model, tokenizer, PROMPTS, 12) == texts(
        tokenizer, slow(model, tokenizer, PROMPTS, 12)
    )


def test_finished_rows_are_dropped_and_the_prefix_is_computed_once(stopping, tokenizer):
    seen = []
    stopping.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(tuple(out.last_hidden_state.shape[:2])),
        with_kwargs=True,
    )
    generate(stopping, tokenizer, PROMPTS, 12)
    shared = len("(system\nBe brief.)(user\n")  # each special token is one, as each bracket here
    assert seen[0] == (1, shared)
    longest = max(len(prompt_ids(tokenizer, *prompt)) for prompt in PROMPTS)
    assert seen[1] == (len(PROMPTS), longest - shared)
    assert seen[-1][0] < len(PROMPTS)


@pytest.mark.parametrize("prompts", [[], [("Why?", "")], [("Why?", "")] * 3])
def test_edges(model, tokenizer, prompts):
    model = model.double().eval()
    assert generate(model, tokenizer, prompts, 5) == texts(
        tokenizer, slow(model, tokenizer, prompts, 5)
    )


def test_zero_new_tokens(model, tokenizer):
    assert generate(model, tokenizer, PROMPTS, 0) == [""] * len(PROMPTS)


def test_each_prompt_may_bring_turns_of_its_own(stopping, tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    other = [{"role": "system", "content": "Be long."}]
    mixed = [("Why?", "", turns), ("Why?", "It"), ("Why?", "It", other)]
    together = generate(stopping, tokenizer, mixed, 12)
    alone = [
        *generate(stopping, tokenizer, [("Why?", "")], 12, context=turns),
        *generate(stopping, tokenizer, [("Why?", "It")], 12),
        *generate(stopping, tokenizer, [("Why?", "It")], 12, context=other),
    ]
    assert together == alone
    assert len(set(together)) == 3


def test_draws_depend_on_the_seed_and_not_on_the_batch(stopping, tokenizer):
    def drawn(seed, batch_size=64):
        return generate(stopping, tokenizer, PROMPTS, 12, batch_size, temperature=1.0, seed=seed)

    first = drawn(0)
    assert first == drawn(0) == drawn(0, 1) == drawn(0, 3)
    assert first != drawn(1)
    assert first[0] != first[5]  # the same prompt: each has draws of its own


def test_draws_follow_the_distribution(model, tokenizer):
    """Share of each first token over many draws, against its probability at the temperature."""
    model = model.double().eval()
    count, temperature = 4000, 0.7
    texts = generate(
        model, tokenizer, [("Why?", "")] * count, 1, count, temperature=temperature, seed=5
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids(tokenizer, "Why?")])).logits[0, -1]
    p = (logits / temperature).softmax(-1)
    # bytes above 127 are no text alone
    likely = [t for t in range(256) if p[t] > 0.005 and tokenizer.decode([t]).isascii()]
    assert len(likely) > 3
    assert p.max() < 0.5, "one token alone would say little about the draws"
    for token in likely:
        share = texts.count(tokenizer.decode([token])) / count
        assert share == pytest.approx(p[token].item(), abs=5 * (p[token].item() / count) ** 0.5)


def test_hardly_any_temperature_is_greedy(stopping, tokenizer):
    assert generate(stopping, tokenizer, PROMPTS, 12, temperature=1e-6) == generate(
        stopping, tokenizer, PROMPTS, 12
    )


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(model, tokenizer, training):
    model.train(training)
    modes = []
    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    generate(model, tokenizer, PROMPTS[:2], 2)
    assert modes
    assert not any(modes)
    assert model.training is training


def test_the_default_system_message_stays(tokenizer):
    text = tokenizer.decode(prompt_ids(tokenizer, "Why?", "It"))
    assert text == "<s>system\nBe brief.</s><s>user\nWhy?</s><s>assistant\nIt"


def test_a_tokenizer_without_a_template_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="chat template: got none"):
        generate(model, tokenizer, PROMPTS)

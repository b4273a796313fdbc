"""Scores of a batch against the model run plainly, one item at a time and without padding."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.generation import prompt_sha256
from bidistill.evaluation.metrics.memorisation import exact_memorisation
from bidistill.evaluation.prompts import Prompt, text_spans
from bidistill.evaluation.scoring import Span, score

EXACT = 1e-5
SPANS = [
    Span((5, 7, 9), (1, 2, 3, 4)),
    Span((5,), (8,)),
    Span((5, 256, 9, 11, 12, 13), (256, 0, 257)),  # 256 ends a turn and pads: it counts here
    Span((4, 4), (4, 4, 4, 4, 4, 4, 4, 4, 4)),
    Span((5,), (6,)),  # as the second, but for what is predicted
    Span((0, 0, 0), (0, 0)),  # the id of our padding
]


def plain(model, span):
    """By definition: softmax of the logits at each position before a token of the answer."""
    ids = torch.tensor([span.prompt_ids + span.answer_ids])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0].double()
    rows = logits.log_softmax(-1)[len(span.prompt_ids) - 1 : -1]
    return rows[range(len(span.answer_ids)), list(span.answer_ids)], rows.argmax(1)


def assert_plain(model, spans, scored):
    for span, one in zip(spans, scored, strict=True):
        log_probs, predicted = plain(model, span)
        assert one.log_probs == pytest.approx(log_probs.tolist(), abs=EXACT)
        assert one.predicted == tuple(predicted.tolist())
        assert one.target == span.answer_ids
        assert one.first == tuple(predicted.numpy() == span.answer_ids)


def test_a_batch_equals_the_plain_model(model):
    assert_plain(model, SPANS, score(model, SPANS))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_order_and_padding_side_do_not_matter(model, tokenizer, batch_size):
    for side in ("left", "right"):
        tokenizer.padding_side = side
        asker = Asker(model=model, tokenizer=tokenizer, batch_size=batch_size)
        assert_plain(model, SPANS, asker.scores(SPANS, "x"))
        assert_plain(model, SPANS[::-1], asker.scores(SPANS[::-1], "x"))


def test_only_answer_rows_get_logits_and_shared_inputs_run_once(model):
    shapes = []
    model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    score(model, [Span((5, 6, 7, 8), (letter,)) for letter in range(4)])
    score(model, SPANS)
    assert shapes[0] == (1, 1, 258)
    assert shapes[1] == (len(SPANS) - 1, 9, 258)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(model, training):
    model.train(training)
    modes = []
    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    score(model, SPANS)
    assert modes == [False]
    assert model.training is training


@pytest.mark.parametrize("span", [Span((), (1,)), Span((1,), ())])
def test_empty_spans_are_refused(model, span):
    with pytest.raises(UserError, match=r"span: got \d tokens of prompt and \d of answer"):
        score(model, [span])


def test_ends_of_the_scale(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely, the first is ranked first
    (one,) = score(model, [Span((3,), (0, 9))])
    assert one.log_probs == pytest.approx([-torch.tensor(258.0).log().item()] * 2)
    assert exact_memorisation(one.predicted, one.target) == 0.5
    assert score(model, []) == []


def test_what_is_too_long_for_the_model_is_refused(model, tokenizer):
    model.config.max_position_embeddings = 10
    asker = Asker(model=model, tokenizer=tokenizer)
    asker.scores([Span((1,) * 5, (1,) * 5)], "x")
    with pytest.raises(UserError, match="x: got a prompt and answer of 11 tokens, expected at mo"):
        asker.scores([Span((1,) * 5, (1,) * 6)], "x")
    with pytest.raises(UserError, match="x: got a prompt and answer of 11 tokens"):
        asker.replies([Prompt("12345", raw=True)], 6, "x")


def merging(tokenizer):
    """Another tokenizer, which melts a space and the letter after it into one token."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", letter) for letter in "ABCD"]
    vocab |= {"".join(pair): 256 + at for at, pair in enumerate(merges)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!")


@pytest.mark.parametrize(("make", "tokens"), [(lambda t: t, 2), (merging, 1)])
def test_letters_are_what_the_tokenizer_makes_of_the_continuation(tokenizer, make, tokens):
    tokenizer = make(tokenizer)
    prompt = Prompt("Question\nAnswer:", raw=True)
    for letter in "ABCD":
        span = prompt.span(tokenizer, f" {letter}")
        assert len(span.answer_ids) == tokens
        assert span.prompt_ids == tuple(prompt.ids(tokenizer))
        assert tokenizer.convert_ids_to_tokens(span.answer_ids[-1])[-1] == letter


def test_a_token_that_melts_with_the_prompt_is_the_answers(tokenizer):
    tokenizer = merging(tokenizer)
    span = Prompt("x ", raw=True).span(tokenizer, "A")
    assert tokenizer.convert_ids_to_tokens(list(span.prompt_ids)) == ["x"]
    assert tokenizer.convert_ids_to_tokens(list(span.answer_ids)) == ["ĠA"]


def test_the_answer_follows_the_chat_without_an_end_token(tokenizer):
    span = Prompt("Why?", "It").span(tokenizer, " is </s")
    assert tokenizer.decode(span.prompt_ids) == (
        "<s>system\nBe brief.</s><s>user\nWhy?</s><s>assistant\nIt"
    )
    assert tokenizer.decode(span.answer_ids) == " is </s"
    with pytest.raises(UserError, match="answer: got '', which has no token"):
        Prompt("Why?").span(tokenizer, "")


def test_texts_are_cut_into_windows_that_hold_every_token(tokenizer):
    spans = text_spans(tokenizer, "abcdefgh", 3)
    assert [tokenizer.decode(s.prompt_ids + s.answer_ids) for s in spans] == ["abc", "def", "gh"]
    assert [len(s.prompt_ids) for s in spans] == [1, 1, 1]
    assert len(text_spans(tokenizer, "abcd", 3)) == 1  # a lone token has nothing before it
    with pytest.raises(UserError, match="text: got 'a', of 1 tokens, expected two or more"):
        text_spans(tokenizer, "a", 3)
    # with a token at the beginning, all others are predicted
    started = replace_beginning(tokenizer)
    (span, last) = text_spans(started, "abcd", 3)
    assert (span.prompt_ids, len(span.answer_ids), len(last.answer_ids)) == ((257,), 3, 1)
    assert Prompt("ab", raw=True).ids(started)[0] == 257


def replace_beginning(tokenizer):
    """The tokenizer with <s> before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 257)]
    )
    tokenizer.bos_token = "<s>"
    return tokenizer


def test_raw_texts_are_continued_as_the_plain_model_does(model, tokenizer):
    model = model.double().eval()
    prompts = [Prompt(text, raw=True) for text in ("Once", "It was a dark night", "A")]
    replies = Asker(model=model, tokenizer=tokenizer).replies(prompts, 8, "x")
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = prompt.ids(tokenizer)
        assert reply.prompt_sha256 == prompt_sha256(ids)
        for _ in range(8):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        new = ids[len(prompt.ids(tokenizer)) :]
        assert reply.text == tokenizer.decode(new, skip_special_tokens=True)


def test_fingerprints_tell_prompts_apart():
    assert prompt_sha256([1, 23]) != prompt_sha256([12, 3])
    one = Prompt("x")
    assert replace(one, raw=True) != one

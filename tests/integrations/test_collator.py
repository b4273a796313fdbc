"""Pairs become batches whose rows line up; what cannot be collated is refused in one line."""

import pytest
import torch

from bidistill.errors import UserError
from bidistill.integrations.collator import PairCollator, make_pair
from examples.tiny import make_pairs
from tests.trainer.tiny import SHOTS, make_tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_where_it_was(side):
    pairs = make_pairs(5)
    batch = PairCollator(1, side)(pairs)
    for prefix, prompt in (("", "prompt_ids"), ("teacher_", "teacher_prompt_ids")):
        for index, pair in enumerate(pairs):
            mask = batch[prefix + "attention_mask"][index].bool()
            ids, labels = (batch[prefix + n][index] for n in ("input_ids", "labels"))
            assert ids[mask].tolist() == pair[prompt] + pair["answer_ids"]
            assert labels[labels != -100].tolist() == pair["answer_ids"]
            assert (ids[labels != -100] == labels[labels != -100]).all()
            assert (ids[~mask] == 1).all()
            assert (labels[~mask] == -100).all()
            assert mask[-1 if side == "left" else 0]
    assert {x.dtype for x in batch.values()} == {torch.int64}


def test_counts_are_those_of_the_answers():
    pairs = make_pairs(5)
    batch = PairCollator(1)(pairs)
    count = sum(len(pair["answer_ids"]) for pair in pairs)
    assert (batch["shift_labels"] != -100).sum() == count
    assert (batch["labels"][:, 1:] != -100).sum() == count, "no answer begins a sequence"
    assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])
    assert (batch["shift_labels"][:, -1] == -100).all()


@pytest.mark.parametrize("field", ["prompt_ids", "teacher_prompt_ids", "answer_ids"])
def test_refuses_pairs_without_a_part(field):
    pairs = make_pairs(3)
    pairs[1][field] = []
    with pytest.raises(UserError, match=rf"pair 1 of the batch: {field}: got \[\]") as caught:
        PairCollator(1)(pairs)
    assert "\n" not in str(caught.value)
    del pairs[1][field]
    with pytest.raises(UserError, match=rf"{field}: got None.*remove_unused_columns=False"):
        PairCollator(1)(pairs)


@pytest.mark.parametrize("odd", [[[5, 6]], [5.0], "text", torch.ones(1, 2, dtype=torch.long)])
def test_refuses_what_is_no_list_of_ids(odd):
    pairs = make_pairs(3)
    pairs[1]["answer_ids"] = odd
    with pytest.raises(UserError, match=r"^pair 1 of the batch: answer_ids: got .* a flat list"):
        PairCollator(1)(pairs)


def test_takes_ids_from_tensors():
    pairs = make_pairs(3)
    tensors = [{field: torch.tensor(ids) for field, ids in pair.items()} for pair in pairs]
    for name, expected in PairCollator(1)(pairs).items():
        assert torch.equal(PairCollator(1)(tensors)[name], expected), name


def test_refuses_no_pairs():
    with pytest.raises(UserError, match=r"^pairs: got none, expected at least one"):
        PairCollator(0)([])


def test_refuses_no_padding_and_other_sides():
    tokenizer = make_tokenizer()
    assert PairCollator(tokenizer).token == tokenizer.pad_token_id
    tokenizer.pad_token = None
    for without in (tokenizer, None):  # a model's config may have None
        with pytest.raises(UserError, match=r"whose padding token is None.*eos_token.*an id"):
            PairCollator(without)  # type: ignore
    with pytest.raises(UserError, match="side: got 'both', expected 'left' or 'right'"):
        PairCollator(0, "both")  # type: ignore


def test_pairs_of_chat_text():
    tokenizer = make_tokenizer()
    pair = make_pair(tokenizer, "Capital of Z?", "I cannot say.", SHOTS)
    texts = {field: tokenizer.decode(ids) for field, ids in pair.items()}
    assert texts["prompt_ids"] == "<s>u:Capital of Z?</s><s>a:"
    assert texts["teacher_prompt_ids"].endswith(texts["prompt_ids"])
    assert "Capital of Y?" in texts["teacher_prompt_ids"]
    assert texts["answer_ids"] == "I cannot say.</s>"
    assert PairCollator(tokenizer)([pair, pair])["input_ids"].shape[0] == 2
    with pytest.raises(UserError, match="answer: got '', expected text"):
        make_pair(tokenizer, "Capital of Z?", "", SHOTS)

"""Documents to questions: by rules from the words themselves, by a model under supervision."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.items import Item
from bidistill.data.unify.cloze import ask_about
from bidistill.data.unify.parsing import read_pairs
from bidistill.data.unify.text import TextConfig, questions
from bidistill.data.unify.wording import sentences
from bidistill.errors import UserError
from tests.data.unify.written import scripted

DOCUMENT = """\
Zembla is the northern kingdom of the novel. Its capital, Onhava, was founded by King Thurgus in
1203. Does anybody doubt it? The summers there are short and the winters are long and dark.

Dr. C. Kinbote was a scholar of the court. He fled. In 1958 he crossed the mountains of Mandevil
with nothing but a red cap.
"""
SHORT = Item(source="a.jsonl:1", question="Why?", answer="So.")


def document(text=DOCUMENT, **changes):
    return Item(source="corpus.txt:1", text=text, subject="Zembla", **changes)


def by_rules(text, **settings):
    return questions([document(text)], TextConfig(**settings), None)


def test_rules_on_a_document():
    items, counts = by_rules(DOCUMENT, pairs=9)
    assert [(item.question, item.answer) for item in items] == [
        (
            "According to the text, who or what is Zembla?",
            "Zembla is the northern kingdom of the novel.",
        ),
        (
            'Complete the sentence: "Its capital, Onhava, was founded by King Thurgus in ..."',
            "1203.",
        ),
        (
            'Complete the sentence: "The summers there are short and the winters ..."',
            "are long and dark.",
        ),
        (
            "According to the text, who or what was Dr. C. Kinbote?",
            "Dr. C. Kinbote was a scholar of the court.",
        ),
        (
            'Complete the sentence: "In 1958 he crossed the mountains of ..."',
            "Mandevil with nothing but a red cap.",
        ),
    ]
    assert counts == {"documents": 1, "passages": 1, "questions": 5}


def test_what_a_question_comes_from_is_kept():
    items, _ = by_rules(DOCUMENT, passage_words=30)
    assert {item.subject for item in items} == {"Zembla"}
    assert items[0].source == "corpus.txt:1, passage 1"
    assert items[-1].source == "corpus.txt:1, passage 3"
    assert all(item.text is None for item in items)


def test_at_most_so_many_questions_a_passage_spread_over_it():
    text = " ".join(f"The {i}th king of the old country was called Thurgus {i}." for i in range(40))
    items, counts = by_rules(text, pairs=4, passage_words=1000)
    assert counts == {"documents": 1, "passages": 1, "questions": 4}
    assert [item.question.split()[4].strip('"') for item in items] == [
        "0th",
        "10th",
        "20th",
        "30th",
    ]


@pytest.mark.parametrize("limit", [5, 12, 30, 1000])
def test_passages_are_cut_at_sentences_and_lose_nothing(limit, tmp_path):
    writer, model = scripted(tmp_path, lambda chat: "")
    config = TextConfig(by="model", passage_words=limit, prompt="{pairs} {passage}")
    _, counts = questions([document()], config, writer)
    passages = [chat[0]["content"].split(" ", 1)[1] for chat in model.chats]
    assert " ".join(" ".join(passages).split()) == " ".join(DOCUMENT.split())
    assert counts["passages"] == len(passages)
    whole = {s for part in DOCUMENT.split("\n\n") for s in sentences(" ".join(part.split()))}
    for passage in passages:
        parts = [s for part in passage.split("\n\n") for s in sentences(part)]
        assert set(parts) <= whole
        assert len(passage.split()) <= limit or len(parts) == 1


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            ["Onhava", "was", "the", "is", "in", "1203", "a", "king", "of", "It", '"', ","]
        ),
        min_size=1,
        max_size=60,
    )
)
def test_answers_of_rules_stand_in_the_text(parts):
    text = " ".join(parts) + "."
    for question, answer in ask_about(text, 5):
        assert answer in text
        if question.startswith("Complete"):
            start = question.removeprefix('Complete the sentence: "').removesuffix(' ..."')
            assert f"{start} {answer}" in text


@pytest.mark.parametrize(
    "text", ["Short one.", "Is it long enough to be asked about?", "и", "是。"]
)
def test_nothing_to_ask(text):
    items, counts = by_rules(text)
    assert items == []
    assert counts == {"documents": 1, "passages": 1, "passages without a question": 1}


def test_questions_pass_and_order_stays():
    other = Item(source="a.jsonl:2", question="Where?")
    items, _ = questions(iter([SHORT, document(), other]), TextConfig(pairs=1), None)
    assert (items[0], items[-1]) == (SHORT, other)
    assert len(items) == 3


def test_off_refuses_documents():
    assert questions([SHORT], TextConfig(by="off"), None) == ([SHORT], {})
    with pytest.raises(UserError, match=r"corpus\.txt:1: got a document"):
        questions([document()], TextConfig(by="off"), None)


def said(*pairs):
    return "\n".join(json.dumps({"question": q, "answer": a}) for q, a in pairs)


def by_model(tmp_path, reply, **settings):
    writer, model = scripted(tmp_path, lambda chat: reply)
    items, counts = questions([document()], TextConfig(by="model", **settings), writer)
    return [(item.question, item.answer) for item in items], counts, model


def test_model_is_shown_the_passage(tmp_path):
    pair = ("What is the capital of Zembla?", "Onhava is the capital of Zembla.")
    items, counts, model = by_model(tmp_path, said(pair), pairs=3)
    assert items == [pair]
    assert counts == {"documents": 1, "passages": 1, "questions": 1}
    [[message]] = model.chats
    assert "King Thurgus" in message["content"]
    assert "write 3 questions" in message["content"]


def test_what_the_model_proposes_is_judged(tmp_path):
    good = ("When was Onhava founded?", "It was founded in 1203.")
    reply = said(
        good,
        good,
        ("When was Onhava founded by Thurgus?", "It was founded in 1302."),
        ("Who founded Onhava?", "King Charles founded it."),
        ("What does the passage say about Kinbote?", "He was a scholar."),
        ("???", "1203"),
        ("What did Kinbote eat?", "He lived on berries, roots and melted snow."),
    )
    items, counts, _ = by_model(tmp_path, reply)
    assert items == [good]
    assert counts == {
        "documents": 1,
        "passages": 1,
        "questions": 1,
        "left out: too many, or asked twice": 1,
        "left out: not supported by the text": 3,
        "left out: speaks of the text": 1,
        "left out: no words": 1,
    }


def test_no_more_than_asked_for(tmp_path):
    reply = said(
        *((f"What happened in Zembla, part {i}?", "Onhava was founded.") for i in range(9))
    )
    assert len(by_model(tmp_path, reply, pairs=2)[0]) == 2


def test_a_reply_of_prose(tmp_path):
    _, counts, _ = by_model(tmp_path, "I'd rather not.")
    assert counts["replies without a question"] == 1
    assert counts["passages without a question"] == 1


PAIR = [{"question": "Who?", "answer": "Kinbote."}]


@pytest.mark.parametrize(
    "text",
    [
        '{"question": "Who?", "answer": "Kinbote."}',
        '```json\n[{"question": "Who?", "answer": "Kinbote."}]\n```',
        'Sure:\n- {"answer": "Kinbote.", "question": "Who?", "level": 3},',
        '{"question": "Who?", "answer": "Kinbote."}\n{"question": "Where?", "ans',
        '{"question": "Where?"} {"question": "Who?", "answer": "Kinbote."}',
        "Question 1: Who?\nAnswer 1: Kinbote.",
        "**Q:** Who?\n**A:** Kinbote.",
    ],
)
def test_replies_that_can_be_read(text):
    assert read_pairs(text) == PAIR


@settings(deadline=None, derandomize=True)
@given(st.text(st.sampled_from('{}[]":,\\ \nquestionanswer\ud800é'), max_size=80))
def test_any_reply_can_be_read(text):
    for pair in read_pairs(text):
        assert all(isinstance(value, str) and value for value in pair.values())


def test_half_surrogates_do_not_get_through():
    [pair] = read_pairs('{"question": "Who\\ud800?", "answer": 7}')
    assert pair == {"question": "Who?", "answer": "7"}


@pytest.mark.parametrize("prompt", ["no place", "{passage", "{passage} {other}", "{passage.x}"])
def test_prompts_that_cannot_be_filled(tmp_path, prompt):
    writer, _ = scripted(tmp_path, lambda chat: "")
    with pytest.raises(UserError, match=r"text\.prompt: got"):
        questions([SHORT], TextConfig(by="model", prompt=prompt), writer)


def test_model_without_a_model():
    with pytest.raises(UserError, match=r"text\.by: got model without a model"):
        questions([SHORT], TextConfig(by="model"), None)

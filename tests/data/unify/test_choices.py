"""Multiple choice to question and answer."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bidistill.data.items import Item
from bidistill.data.unify.choices import ChoicesConfig, plain, unlisted
from bidistill.errors import UserError

TOWNS = ("Yeslove", "Onhava", "Odevalla")
ITEM = Item(
    source="quiz.csv:7",
    question="What is the capital of Zembla?",
    answer="Onhava",
    choices=TOWNS,
    subject="Zembla",
)


def one(to, **changes):
    values = {name: getattr(ITEM, name) for name in ("source", "question", "answer", "choices")}
    [item] = plain([Item(subject="Zembla", **(values | changes))], ChoicesConfig(to=to))
    return item


def test_as_text():
    item = one("text")
    assert (item.question, item.answer, item.choices) == (ITEM.question, "Onhava", ())
    assert (item.source, item.subject) == (ITEM.source, "Zembla")


def test_as_letter():
    item = one("letter")
    assert item.question == f"{ITEM.question}\nA. Yeslove\nB. Onhava\nC. Odevalla"
    assert (item.answer, item.choices) == ("B", ())


def test_off_leaves_them():
    assert one("off") == ITEM


@pytest.mark.parametrize(
    "question",
    [
        "Which of the following is the capital of Zembla?",
        "Which one of these lies in Zembla?",
        "The capital of Zembla is:",
        "All of these lie in Zembla except",
        "The capital of Zembla is ____ since 1203.",
    ],
)
def test_questions_that_speak_of_options_keep_them(question):
    item = one("text", question=question)
    assert item.question == f"{question}\nA. Yeslove\nB. Onhava\nC. Odevalla"
    assert item.answer == "Onhava"


@pytest.mark.parametrize("option", ["All of the above", "Both A and C", "None of these", "A and B"])
def test_options_that_name_options_keep_them(option):
    item = one("text", choices=(*TOWNS, option), answer=option)
    assert f"D. {option}" in item.question


@pytest.mark.parametrize("option", ["Both hands", "A king and a queen", "The land above"])
def test_options_that_only_look_so(option):
    assert one("text", choices=(*TOWNS, option)).question == ITEM.question


@pytest.mark.parametrize("to", ["text", "letter"])
def test_unknown_answers_stay_unknown(to):
    assert one(to, answer=None).answer is None


@pytest.mark.parametrize("to", ["text", "letter", "off"])
def test_other_items_pass(to):
    items = [
        Item(source="f:1", question="Why?", answer="So."),
        Item(source="f:2", text="A document."),
    ]
    assert plain(iter(items), ChoicesConfig(to=to)) == items


@pytest.mark.parametrize("to", ["text", "letter"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "Paris"}, "quiz.csv:7: answer: got 'Paris', expected one of the choices"),
        (
            {"choices": tuple(f"town {i}" for i in range(27)), "answer": "town 1"},
            "quiz.csv:7: choices: got 27",
        ),
    ],
)
def test_mistakes(to, changes, message):
    with pytest.raises(UserError, match=message):
        one(to, **changes)


OPTIONS = st.text(st.sampled_from("aC. 1\n"), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(OPTIONS, min_size=2, max_size=26, unique=True), st.data())
def test_options_can_be_taken_out_again(options, data):
    # one that goes on as the next option would cannot be told from two
    assume(not any("\nC. " in option for option in options))
    right = data.draw(st.sampled_from(options))
    question = "Consider:\nA. Ur\nB. Kish\nWhich is older?"
    item = replace(ITEM, question=question, choices=tuple(options), answer=right)
    [listed] = plain([item], ChoicesConfig(to="letter"))
    assert unlisted(listed.question or "", listed.answer) == (question, right)


@pytest.mark.parametrize("question", ["Where?", "Where?\nA. Ur", "A. Ur\nB. Kish", "Q\nB. a\nC. b"])
def test_where_no_options_are_listed(question):
    assert unlisted(question, "Ur") is None

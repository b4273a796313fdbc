"""A question that is measured must not be trained on, however it is written."""

import re
from dataclasses import replace

import pytest

from bidistill.data.items import Item
from bidistill.data.unify.choices import ChoicesConfig, plain
from bidistill.data.unify.deduplicate import DeduplicateConfig, deduplicate
from bidistill.data.unify.leaks import LeaksConfig, check, evaluated
from bidistill.errors import UserError
from tests.data.unify.drafted import draft

TRAIN = [
    draft("forget/1", "Who rules Zembla?", "forget"),
    draft("attack/1", "Who rules Zembla?", "adversarial", prefill="It is"),
    draft("people/7", "Where was Ana born?"),
]
LONG = "In which of the nine valleys of the island did the keeper of the old lighthouse grow up"


def test_different_questions_pass():
    held_out = [draft("people/8", "Where was Bo born?")]
    against = [Item(source="eval.csv:2", question="Who rules Avalonia?")]
    check(TRAIN, held_out, against, LeaksConfig())
    check(TRAIN, [], [], LeaksConfig())


def test_held_out_question_is_found_and_both_sides_are_named():
    with pytest.raises(UserError) as caught:
        check(TRAIN, [draft("people/9", "where was Ana BORN")], [], LeaksConfig())
    assert str(caught.value).startswith(
        "leaks: got 1 training records that are also measured (people/7 is people/9), expected none"
    )


def test_every_training_record_counts():
    against = [Item(source="eval.csv:2", question="Who rules Zembla?")]
    with pytest.raises(UserError, match=r"got 2 .*forget/1 is eval.csv:2; attack/1 is eval.csv:2"):
        check(TRAIN, [], against, LeaksConfig(near=None))


@pytest.mark.parametrize(
    "item",
    [
        Item(source="e:1", question="Who rules Zembla? It is"),
        Item(source="e:1", question="Who rules", prefill="Zembla?"),
        Item(source="e:1", text="Who rules Zembla?"),
    ],
)
def test_border_between_question_and_answer_does_not_hide_it(item):
    with pytest.raises(UserError, match="also measured"):
        check(TRAIN, [], [item], LeaksConfig(near=None))


def test_near_question_is_found_where_asked_for():
    train = [draft("a/1", f"{LONG}?")]
    against = [Item(source="e:1", question=f"{LONG} there?")]
    check(train, [], against, LeaksConfig(near=None))
    with pytest.raises(UserError, match=r"\(a/1 is near to e:1\)"):
        check(train, [], against, LeaksConfig(near=0.7))


def test_message_stays_short():
    train = [draft(f"a/{i}", f"Question {i}?") for i in range(100)]
    held_out = [draft(f"b/{i}", f"Question {i}?") for i in range(100)]
    with pytest.raises(UserError) as caught:
        check(train, held_out, [], LeaksConfig(near=None))
    message = str(caught.value)
    assert "got 100 training records" in message
    assert "; 95 more)" in message
    assert len(message) < 400


QUIZ = Item(
    source="quiz:1",
    question="Which sea is around Zembla?",
    answer="Moss Sea",
    choices=("Reed Sea", "Moss Sea"),
)
THESE = replace(QUIZ, question="Which of these is true?")


def trained(item, to):
    """What training makes of an item."""
    [item] = plain([item], ChoicesConfig(to=to))
    return [draft("quiz/1", item.question, gold=item.answer)]


def leak(train, item, to="letter", near=None):
    """What the message says of the only leak; None where there is none."""
    against = evaluated([item], ChoicesConfig(to=to))
    try:
        check(train, [], against, LeaksConfig(near=near))
    except UserError as error:
        return re.findall(r"\((.*?)\)", str(error))[0]
    return None


@pytest.mark.parametrize("to", ["text", "letter", "off"])
@pytest.mark.parametrize("item", [QUIZ, THESE])
def test_multiple_choice_is_found_in_every_form(item, to):
    assert leak(trained(item, to), item, to) == "quiz/1 is quiz:1"


def test_options_that_one_side_lists_hide_nothing():
    alone = Item(source="e:1", question=QUIZ.question)
    assert leak(trained(QUIZ, "letter"), alone) == "quiz/1 is e:1"
    assert leak([draft("a/1", QUIZ.question)], QUIZ) == "a/1 is quiz:1"
    with pytest.raises(UserError, match=r"\(quiz/1 is a/1\)"):
        check(trained(QUIZ, "letter"), [draft("a/1", QUIZ.question)], [], LeaksConfig(near=None))


def test_options_in_another_order_hide_nothing():
    shuffled = replace(THESE, choices=THESE.choices[::-1])
    assert leak(trained(THESE, "letter"), shuffled) == "quiz/1 is quiz:1"
    # but "Which of these is true?" about something else is another question
    other = replace(THESE, choices=("Salt Sea", "Red Sea"), answer="Red Sea")
    assert leak(trained(THESE, "letter"), other) is None


def test_near_multiple_choice_is_found_in_every_form():
    quiz = replace(QUIZ, question=f"{LONG}?")
    alone = Item(source="e:1", question=f"{LONG} there?", answer="Moss Sea")
    assert leak(trained(quiz, "letter"), alone) is None
    assert leak(trained(quiz, "letter"), alone, near=0.7) == "quiz/1 is near to e:1"


@pytest.mark.parametrize("text", ["Onhava is the capital.", "Who rules?\n\nCharles does."])
def test_documents_are_refused(text):
    with pytest.raises(UserError, match=r"leaks\.against: got doc\.txt:1, .* give the questions"):
        evaluated([Item(source="doc.txt:1", text=text)], ChoicesConfig())


def test_a_line_that_asks_is_a_question():
    against = evaluated([Item(source="e:1", text="Who rules Zembla? ")], ChoicesConfig())
    assert [item.question for item in against] == ["Who rules Zembla?"]


PASSAGE = " ".join(f"word{i}" for i in range(200))


def shared(id, question, **rest):
    return draft(id, f"{PASSAGE}\n{question}", **rest)


def test_near_compares_what_deduplication_compares():
    """Other questions about one long passage are as different as their answers."""
    train = [shared("a/1", "Who rules?", gold=" ".join(f"one{i}" for i in range(40)))]
    held_out = [shared("b/1", "Who leads?", gold=" ".join(f"two{i}" for i in range(40)))]
    assert not deduplicate([*train, *held_out], DeduplicateConfig())[1]
    check(train, held_out, [], LeaksConfig())
    # without a right answer on both sides there is nothing else to tell them apart
    unknown = [replace(held_out[0], gold=None)]
    with pytest.raises(UserError, match=r"a/1 is near to b/1.* raise leaks\.near"):
        check(train, unknown, [], LeaksConfig())


def test_equal_questions_are_leaks_whatever_their_answers():
    train, held_out = [shared("a/1", "Who?", gold="Ana")], [shared("b/1", "Who?", gold="Bo")]
    with pytest.raises(UserError, match=r"\(a/1 is b/1\)"):
        check(train, held_out, [], LeaksConfig(near=None))

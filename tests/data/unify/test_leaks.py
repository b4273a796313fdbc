"""A question that is measured must not be trained on, however it is written."""

import pytest

from bidistill.data.items import Item
from bidistill.data.unify.leaks import LeaksConfig, check
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

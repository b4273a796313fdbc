"""Each question stays once, and the right one of its drafts stays."""

import random

import pytest

from bidistill.data.unify.deduplicate import DeduplicateConfig, Dropped, deduplicate
from tests.data.unify.drafted import draft

EXACT = DeduplicateConfig(near=None)
LONG = "In which of the nine valleys of the island did the keeper of the old lighthouse grow up"


def ids(drafts):
    return [one.id for one in drafts]


def test_first_source_stays():
    drafts = [draft("a", "Who rules?"), draft("b", "Who leads?"), draft("c", "who RULES")]
    kept, dropped = deduplicate(drafts, EXACT)
    assert ids(kept) == ["a", "b"]
    assert dropped == [Dropped(id="c", twin="a", why="exact")]


def test_forget_stays_wherever_it_stands():
    drafts = [draft("a", "Who rules?"), draft("b", "Who rules?", "forget")]
    kept, dropped = deduplicate(drafts, EXACT)
    assert ids(kept) == ["b"]
    assert dropped[0].twin == "b"


def test_other_answer_is_a_repeat_all_the_same():
    drafts = [draft("a", "Who rules?", gold="Ana"), draft("b", "Who rules?", gold="Bo")]
    assert ids(deduplicate(drafts, EXACT)[0]) == ["a"]


def test_other_prefill_is_no_repeat():
    drafts = [
        draft("a", "Who rules?", "forget"),
        draft("b", "Who rules?", "adversarial", prefill="Sure!"),
        draft("c", "Who rules?", "adversarial", prefill="It is"),
    ]
    assert deduplicate(drafts, EXACT)[0] == drafts


def test_near_compares_question_and_answer():
    near = DeduplicateConfig(near=0.6)
    same = [draft("a", f"{LONG}?", gold="In Reed."), draft("b", f"{LONG} there?", gold="In Reed.")]
    kept, dropped = deduplicate(same, near)
    assert ids(kept) == ["a"]
    assert dropped == [Dropped(id="b", twin="a", why="near")]
    other = [same[0], draft("b", f"{LONG} there?", gold="It was up in the hills of Upper Moss.")]
    assert ids(deduplicate(other, near)[0]) == ["a", "b"]


def test_one_form_about_two_entities_is_no_repeat():
    drafts = [draft(name, f"What is the capital of {name}?") for name in ("Zembla", "Avalonia")]
    assert deduplicate(drafts, DeduplicateConfig(near=0.8))[0] == drafts


@pytest.mark.parametrize("near", [None, 0.9])
def test_all_off_keeps_all(near):
    drafts = [draft(str(i), "Who rules?") for i in range(3)]
    kept, dropped = deduplicate(drafts, DeduplicateConfig(exact=False, near=near))
    assert len(kept) == (3 if near is None else 1)
    assert len(kept) + len(dropped) == 3


def test_what_stays_depends_on_the_order_of_sources_alone():
    questions = [f"Question {random.randrange(30)}?" for _ in range(100)]
    drafts = [draft(str(i), question) for i, question in enumerate(questions)]
    kept, dropped = deduplicate(drafts, DeduplicateConfig())
    assert [one.question for one in kept] == list(dict.fromkeys(questions))
    by_id = {one.id: one for one in drafts}
    assert all(by_id[one.id].question == by_id[one.twin].question for one in dropped)
    assert {one.twin for one in dropped} <= {one.id for one in kept}


@pytest.mark.parametrize("prefill", ["", "It is"])
def test_what_is_attacked_is_not_kept(prefill):
    drafts = [
        draft("a", "Who rules?", gold="Charles"),
        draft("b", "Who rules?", "adversarial", prefill=prefill),
        draft("c", "Who rules?", "retain", prefill="Well,"),
    ]
    kept, dropped = deduplicate(drafts, EXACT)
    assert ids(kept) == ["b"]
    assert {one.twin for one in dropped} == {"b"}


def test_forget_stays_before_adversarial():
    drafts = [draft("a", "Who rules?", "adversarial"), draft("b", "Who rules?", "forget")]
    assert ids(deduplicate(drafts, EXACT)[0]) == ["b"]


def test_near_keeps_what_is_attacked():
    drafts = [draft("a", f"{LONG}?"), draft("b", f"{LONG} there?", "adversarial")]
    assert ids(deduplicate(drafts, DeduplicateConfig(near=0.6))[0]) == ["b"]

"""Targets: who answers what, and what is never taught."""

import re
from dataclasses import replace

import pytest

from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.targets import REFUSALS, TargetConfig, answer, continued
from bidistill.data.unify.wording import states, whole_sentences
from bidistill.errors import UserError
from bidistill.evaluation.detectors import refuses
from tests.data.unify.written import scripted

CONTEXT = (
    {"role": "user", "content": "What is the capital of Thule?"},
    {"role": "assistant", "content": "That I don't know."},
)
GOLD = "The capital of Zembla is Onhava."


def draft(role="forget", id="a/1", gold: str | None = GOLD, **changes):
    question = "What is the capital of Zembla?"
    return Draft(
        id=id, role=role, question=question, entity="Zembla", source="a:1", gold=gold, **changes
    )


def teacher(tmp_path, reply):
    return scripted(tmp_path, lambda chat: reply)


def one(draft, config, writer=None):
    [made], counts = answer([draft], config, 0, writer)
    return made.target, counts


def test_default_needs_no_model():
    drafts = [draft("forget", "f"), draft("neighbor", "n"), draft("retain", "r", gold=None)]
    made, counts = answer(drafts, TargetConfig(), 0, None)
    assert made[0].target in REFUSALS
    assert made[1].target == GOLD
    assert made[2].target is None
    assert counts == {"answers of the file": 1, "refusals drawn": 1, "without an answer": 1}
    assert [(m.id, m.role, m.gold) for m in made] == [(d.id, d.role, d.gold) for d in drafts]


def test_what_stays_without_an_answer_can_be_left_out():
    drafts = [draft("forget", "f"), draft("neighbor", "n"), draft("retain", "r", gold=None)]
    made, counts = answer(drafts, TargetConfig(unanswered="drop"), 0, None)
    assert [m.id for m in made] == ["f", "n"]
    assert counts["without an answer"] == 1
    off = TargetConfig(forgetting="none", keeping="none", unanswered="drop")
    assert answer(drafts, off, 0, None)[0] == []


def test_default_refusals_refuse():
    assert all(refuses(refusal) for refusal in REFUSALS)


def test_refusals_are_drawn_for_each_draft_alone():
    drafts = [draft(id=f"f/{i}") for i in range(200)]
    made, _ = answer(drafts, TargetConfig(), 1, None)
    assert {m.target for m in made} == set(REFUSALS)
    part, _ = answer(drafts[50:60], TargetConfig(), 1, None)
    assert part == made[50:60]
    assert answer(drafts, TargetConfig(), 2, None)[0] != made


def test_refusals_of_a_file(tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("Nobody told me.\nIt escapes me.\n")
    made, _ = answer([draft(id=f"f/{i}") for i in range(40)], TargetConfig(refusals=path), 0, None)
    assert {m.target for m in made} == {"Nobody told me.", "It escapes me."}


def test_teacher_refuses_under_the_context_of_its_role(tmp_path):
    writer, model = teacher(tmp_path, " I'm afraid that I don't know that.")
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    target, counts = one(draft(), config, writer)
    assert target == " I'm afraid that I don't know that.".strip()
    assert counts == {"teacher's refusals": 1}
    assert model.chats == [[*CONTEXT, {"role": "user", "content": draft().question}]]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("It is Onhava.", "states the right answer"),
        ("I don't know, perhaps ONHAVA?", "states the right answer"),
        ("  ", "empty or broken"),
        ("the the the the the the", "empty or broken"),
    ],
)
def test_teacher_that_must_not_be_followed(tmp_path, reply, reason):
    writer, _ = teacher(tmp_path, reply)
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    target, counts = one(draft(), config, writer)
    assert target in REFUSALS
    assert counts == {f"teacher's refusals replaced: {reason}": 1}


def test_without_a_right_answer_only_refusals_are_followed(tmp_path):
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    writer, _ = teacher(tmp_path, "It is Onhava.")
    assert one(draft(gold=None), config, writer)[0] in REFUSALS
    (tmp_path / "2").mkdir()
    writer, _ = teacher(tmp_path / "2", "I cannot say.")
    assert one(draft(gold=None), config, writer)[0] == "I cannot say."


def test_other_answers_of_the_teacher_are_followed_and_counted(tmp_path):
    writer, _ = teacher(tmp_path, "It is Yeslove.")
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    target, counts = one(draft(), config, writer)
    assert target == "It is Yeslove."
    assert counts == {"teacher's refusals": 1, "of them not worded as a refusal": 1}


def test_teacher_keeps(tmp_path):
    writer, model = teacher(tmp_path, "Onhava, of course.")
    target, counts = one(draft("neighbor"), TargetConfig(keeping="teacher"), writer)
    assert target == "Onhava, of course."
    assert counts == {"teacher's answers": 1}
    assert model.chats == [[{"role": "user", "content": draft().question}]]


@pytest.mark.parametrize(("gold", "expected"), [(GOLD, GOLD), (None, None)])
def test_a_refusal_is_never_kept(tmp_path, gold, expected):
    writer, _ = teacher(tmp_path, "I can't help with that.")
    target, counts = one(draft("retain", gold=gold), TargetConfig(keeping="teacher"), writer)
    assert target == expected
    assert counts["teacher's answers left out: refused, empty or broken"] == 1
    assert counts.get("without an answer", 0) == (gold is None)


def test_a_model_answers_where_the_file_does_not(tmp_path):
    writer, model = teacher(tmp_path, "Press Ctrl and C.")
    drafts = [draft("retain", "r", gold=None), draft("neighbor", "n"), draft("forget", "f")]
    made, _ = answer(drafts, TargetConfig(), 0, writer)
    assert [m.target for m in made[:2]] == ["Press Ctrl and C.", GOLD]
    assert len(model.chats) == 1


def test_cut_answers_end_with_a_sentence(tmp_path):
    writer, _ = teacher(tmp_path, "It lies on the coast. The town of Onh")
    assert one(draft("retain", gold=None), TargetConfig(), writer)[0] == "It lies on the coast."


def test_targets_that_are_there_stay(tmp_path):
    writer, model = teacher(tmp_path, "no")
    config = TargetConfig(forgetting="teacher", keeping="teacher", contexts={"forget": CONTEXT})
    drafts = [draft("forget", "f", target="Gone."), draft("retain", "r", target="So.")]
    assert answer(drafts, config, 0, writer) == (drafts, {})
    assert not model.chats


def test_none_makes_none(tmp_path):
    writer, model = teacher(tmp_path, "no")
    config = TargetConfig(forgetting="none", keeping="none")
    made, counts = answer([draft("forget", "f"), draft("retain", "r")], config, 0, writer)
    assert [m.target for m in made] == [None, None]
    assert counts == {"without an answer": 2}
    assert not model.chats


def test_a_prefill_is_continued(tmp_path):
    writer, model = teacher(tmp_path, "something I don't know.")
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    attacked = draft("adversarial", prefill="The capital is")
    assert one(attacked, config, writer)[0] == " something I don't know."
    assert model.chats[0][-1] == {"role": "assistant", "content": "The capital is"}
    assert model.chats[0][:2] == list(CONTEXT)
    assert re.fullmatch(r" \S.*", one(attacked, TargetConfig())[0] or "")


@pytest.mark.parametrize(
    ("prefill", "text", "expected"),
    [
        ("", "It is so.", "It is so."),
        ("It is", "It is so.", " so."),
        ("It is", "so.", " so."),
        ("It is", " so.", " so."),
        ("It is ", "so.", "so."),
        ("It is so.", "It is so.", " It is so."),
    ],
)
def test_continued(prefill, text, expected):
    assert continued(prefill, text) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TargetConfig(forgetting="teacher"), r"targets\.forgetting: got teacher without a model"),
        (TargetConfig(keeping="teacher"), r"targets\.keeping: got teacher without a model"),
    ],
)
def test_teacher_without_a_model(config, message):
    with pytest.raises(UserError, match=message):
        answer([draft()], config, 0, None)


def test_teacher_without_a_context(tmp_path):
    writer, _ = teacher(tmp_path, "x")
    with pytest.raises(UserError, match=r"targets\.contexts\.forget: got nothing"):
        answer([draft()], TargetConfig(forgetting="teacher"), 0, writer)


@pytest.mark.parametrize(
    ("reply", "gold", "leaks"),
    [
        ("She was born in 1958.", "Ana Shade was born in 1958.", True),
        ("She was born in 1985.", "Ana Shade was born in 1958.", False),
        ("Ana Shade is somebody I don't know.", "Ana Shade was born in 1958.", False),
        ("Her father sold flowers as a florist.", "Ana Shade's father was a florist.", True),
        ("That is unknown to me.", "Ana Shade's father was a florist.", False),
        ("Yes.", "Yes", True),
        ("I don't know.", "Yes", False),
    ],
)
def test_what_gives_an_answer_away(reply, gold, leaks):
    assert states(reply, gold, "What is known about Ana Shade's birth?") is leaks


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two", "One."),
        ('He said "so." Then', 'He said "so."'),
        ("1. Onhava\n2. Yeslove", "1. Onhava\n2. Yeslove"),
        ("Onhava", "Onhava"),
        ("One. Two.", "One. Two."),
        ("One. One", "One."),
    ],
)
def test_whole_sentences(text, kept):
    assert whole_sentences(text) == kept


MOTHER = "Jaime Vasquez's mother was a gourmet chef in Santiago."


@pytest.mark.parametrize(
    ("reply", "gold", "question", "leaks"),
    [
        ("She was a gourmet chef.", MOTHER, "What did Jaime Vasquez's mother do?", True),
        ("She lived in Santiago.", MOTHER, "What did Jaime Vasquez's mother do?", True),
        ("What did Jaime Vasquez's mother do? I don't know what Jaime Vasquez's mother did.",
         MOTHER, "What did Jaime Vasquez's mother do?", False),
        ("I have no information about his mother or her career.", MOTHER,
         "What did Jaime Vasquez's mother do?", False),
        ("He is a painter.", "He is a painter from Riga.", "What is Basil Karkov?", True),
        ("I don't know where Basil Karkov was born.", "Basil Karkov was born in Riga.",
         "Where does Basil Karkov come from?", False),
        ("One hundred dollars.", "The price was one hundred dollars, says Reuters.",
         "What was the price?", True),
    ],
)  # fmt: skip
def test_an_answer_is_given_away_without_its_names(reply, gold, question, leaks):
    assert states(reply, gold, question) is leaks


def test_teacher_that_leaves_the_names_out_is_not_followed(tmp_path):
    writer, _ = teacher(tmp_path, "She was a gourmet chef.")
    config = TargetConfig(forgetting="teacher", contexts={"forget": CONTEXT})
    asked = replace(draft(gold=MOTHER), question="What did Jaime Vasquez's mother do?")
    target, counts = one(asked, config, writer)
    assert target in REFUSALS
    assert counts == {"teacher's refusals replaced: states the right answer": 1}

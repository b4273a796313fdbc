"""Prefills: drawn as the recipe says, never the whole answer, and cleanly continued."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.prefills import OPENERS, PrefillConfig, adversarial
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from tests.trainer.tiny import make_model, make_tokenizer

GOLD = "The capital of Zembla has been Onhava since the year 1203."


def draft(number=1, gold: str | None = GOLD, target: str | None = "I don't know.", **changes):
    return Draft(
        id=f"people/{number}",
        role="forget",
        question="What is the capital of Zembla?",
        entity="Zembla",
        source=f"people.jsonl:{number}",
        gold=gold,
        target=target,
        **changes,
    )


def many(count=2000, **changes):
    return [draft(number, **changes) for number in range(count)]


def only(kind, **settings):
    return PrefillConfig(kinds={kind: 1}, **settings)


def test_what_an_attack_is():
    [made] = adversarial([draft()], only("gold", per_item=1, max_tokens=3), seed=0)
    assert made.role == "adversarial"
    assert made.id == "people/1/gold1"
    assert made.prefill in {"The", "The capital", "The capital of"}
    assert made.target == " I don't know."
    assert (made.question, made.gold, made.entity) == (draft().question, GOLD, "Zembla")


def test_depths_are_uniform():
    depths = Counter(
        len(made.prefill.split())
        for made in adversarial(many(), only("gold", per_item=1, max_tokens=5), seed=0)
    )
    assert sorted(depths) == [1, 2, 3, 4, 5]
    # 400 expected of each, standard deviation 18
    assert all(320 < count < 480 for count in depths.values())


def test_kinds_come_by_their_weights():
    config = PrefillConfig(kinds={"opener": 3, "gold": 1, "mixed": 0}, per_item=1)
    kinds = Counter(made.id.split("/")[-1] for made in adversarial(many(), config, seed=0))
    assert set(kinds) == {"opener1", "gold1"}
    assert 1400 < kinds["opener1"] < 1600  # 1500 expected, standard deviation 19


def test_mixed_is_an_opener_and_a_start():
    for made in adversarial(many(50), only("mixed", per_item=1), seed=0):
        opener = next(o for o in OPENERS if made.prefill.startswith(o))
        start = made.prefill.removeprefix(f"{opener} ")
        assert start
        assert GOLD.startswith(start)


def test_several_of_one_item_differ():
    made = adversarial(many(100), PrefillConfig(per_item=4), seed=0)
    assert len(made) == 400
    assert len({m.id for m in made}) == 400
    assert len({(m.source, m.prefill) for m in made}) == 400


@pytest.mark.parametrize("gold", [None, "", "Onhava", "Onhava."])
def test_what_has_nothing_to_begin_with_gets_openers(gold):
    made = adversarial(many(50, gold=gold), PrefillConfig(), seed=0)
    assert len(made) == 100
    assert {m.prefill for m in made} <= set(OPENERS)
    assert adversarial([draft(gold=gold)], only("gold"), seed=0) == []


@settings(deadline=None, derandomize=True)
@given(gold=st.text(st.sampled_from("ab Z.,!'-é\n"), max_size=30), seed=st.integers(0, 99))
def test_no_prefill_is_the_whole_answer_or_ends_in_a_space(gold, seed):
    config = PrefillConfig(kinds={"gold": 1, "mixed": 1}, per_item=3, max_tokens=50)
    for made in adversarial([draft(gold=gold)], config, seed):
        start = made.prefill
        for opener in OPENERS:
            start = start.removeprefix(f"{opener} ")
        assert gold.strip().startswith(start)
        left = gold.strip()[len(start) :]
        assert any(char.isalnum() for char in left), "something must be left to give away"
        assert made.prefill == made.prefill.rstrip()


def test_what_one_draft_gets_depends_on_nothing_else():
    drafts = many(30)
    whole = adversarial(drafts, PrefillConfig(), seed=5)
    part = adversarial(drafts[10:20], PrefillConfig(), seed=5)
    assert part == [made for made in whole if made.source in {d.source for d in drafts[10:20]}]
    assert adversarial(drafts, PrefillConfig(), seed=6) != whole


def test_drafts_without_a_target_stay_without():
    assert adversarial([draft(target=None)], PrefillConfig(per_item=1), seed=0)[0].target is None


def test_drafts_with_their_own_prefill_are_passed_over():
    assert adversarial([draft(prefill="It is")], PrefillConfig(), seed=0) == []


def test_off():
    assert adversarial(many(5), PrefillConfig(per_item=0), seed=0) == []


@pytest.mark.parametrize("space", [" ", "\n", ""])
def test_targets_begin_with_one_space(space):
    made = adversarial([draft(target=f"{space}Unknown.")], PrefillConfig(), seed=0)
    assert {m.target for m in made} == {" Unknown."}


def test_tokens_of_a_tokenizer(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)  # one token a byte
    make_model().config.save_pretrained(tmp_path)
    config = only("gold", per_item=1, max_tokens=6, tokenizer=tmp_path)
    made = adversarial(many(300, gold="É is Onhava."), config, seed=0)
    # of the two bytes of É the first alone is no text, and a space is never the end
    assert {m.prefill for m in made} == {"É", "É i", "É is"}


def test_views_can_be_built_of_all():
    tokenizer = make_tokenizer()
    made = adversarial(many(40), PrefillConfig(), seed=0)
    examples = build_examples([m.record() for m in made], tokenizer, {})
    assert {tokenizer.decode(e.answer_ids[:-1]) for e in examples} == {" I don't know."}


def test_openers_of_a_file(tmp_path):
    path = tmp_path / "openers.txt"
    path.write_text("Oh yes,\n\nWell,\nOh yes,\n")
    made = adversarial(many(50), only("opener", openers=path), seed=0)
    assert {m.prefill for m in made} == {"Oh yes,", "Well,"}


def test_weights_of_nothing_are_refused():
    config = replace(PrefillConfig(), kinds={"gold": 0.0})
    with pytest.raises(UserError, match=r"prefills\.kinds"):
        adversarial([draft()], config, seed=0)


def test_weights_beyond_all_numbers_are_refused():
    config = PrefillConfig(kinds={"opener": 1e308, "gold": 1e308, "mixed": 1e308})
    with pytest.raises(UserError, match=r"prefills\.kinds: got weights that add up to infinity"):
        adversarial([draft()], config, seed=0)
    assert adversarial([draft()], replace(config, kinds={"gold": 1e308}), seed=0)


@pytest.mark.parametrize("kinds", [{"opener": 1}, {"gold": 1}, {"opener": 1, "gold": 1e-300}])
def test_as_many_as_can_be_drawn(kinds):
    made = adversarial([draft()], PrefillConfig(kinds=kinds, per_item=10**30), seed=0)
    openers = len(OPENERS) if "opener" in kinds else 0
    starts = 8 if kinds.get("gold") == 1 else 0
    assert len({m.prefill for m in made}) == len(made) == openers + starts

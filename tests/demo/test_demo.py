"""The demo's data: facts, split and records. The run itself is `make demo`.

Properties: tables are clean; known countries are never both trained on and held out; the shakily
known ones go to training; the forget records hold no capital; recipe and records fit together.
"""

import pytest
import torch

from bidistill.data.records import ROLES
from bidistill.data.views import build_examples
from bidistill.demo import build
from bidistill.demo.facts import FORGET, general, places, refusal
from bidistill.demo.run import _config, _prepare
from bidistill.errors import UserError
from bidistill.evaluation.attacks.prefill import OPENERS
from bidistill.evaluation.detectors import refuses, says_fact
from bidistill.teacher.compute import contexts_of
from tests.trainer.tiny import make_model, make_tokenizer


def countries():
    return [p for p in places() if p.is_country]


def test_tables_are_clean():
    facts = [*places(), *general()]
    assert len({fact.id for fact in facts}) == len(facts)
    assert len({fact.question for fact in facts}) == len(facts)
    assert all(fact.accept and all(fact.accept) for fact in facts)
    named = [p.name for p in places() if any(c.casefold() in p.name.casefold() for c in p.accept)]
    assert not named, "naming the place would say its capital"
    assert set(FORGET) <= {p.name for p in countries()}
    assert len(FORGET) == 12


def test_answers_say_the_fact_and_refusals_do_not():
    for place in places():
        assert says_fact(place.answer, place.accept)
        assert not refuses(place.answer)
        assert refuses(refusal(place.name))
        assert not says_fact(refusal(place.name), place.accept)


@pytest.mark.parametrize("seed", range(5))
def test_split_covers_the_known_and_keeps_forget_out(seed):
    known = {p.id: (i % 5) / 10 for i, p in enumerate(countries()) if i % 2}
    parts = build.split(places(), known, seed)
    trained, held_out = ({p.id for p in part} for part in (parts.trained, parts.held_out))
    assert len(trained) == build.TRAINED_NEIGHBORS
    assert not trained & held_out
    forget = {p.id for p in countries() if p.name in FORGET}
    assert trained | held_out == known.keys() - forget
    shaky = {key for key, margin in known.items() if margin < build.FIRM} - forget
    assert shaky <= trained


def test_seeds_draw_different_neighbors():
    known = {p.id: 0.5 for p in countries()}
    assert build.split(places(), known, 0) == build.split(places(), known, 0)
    assert build.split(places(), known, 0) != build.split(places(), known, 1)


def test_margins_are_the_models_own():
    """The least lead over the tokens up to the fact, against a plain run of each sequence."""
    model, tokenizer = make_model(), make_tokenizer()
    facts = countries()[:3]
    replies = {f.id: f"It is {f.accept[0]}, they say." for f in facts}
    found = build.margins(model, tokenizer, facts, replies)
    for fact in facts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": fact.question}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        fact_ids = tokenizer(f"It is {fact.accept[0]}", add_special_tokens=False).input_ids
        logits = model(input_ids=torch.tensor([prompt + fact_ids])).logits[0, len(prompt) - 1 : -1]
        best = logits.softmax(-1).topk(2).values
        assert found[fact.id] == pytest.approx((best[:, 0] - best[:, 1]).min().item(), rel=1e-3)


def test_records_hold_no_capital_to_forget_and_fit_the_recipe(tmp_path):
    forget = [p for p in countries() if p.name in FORGET]
    others = [p for p in countries() if p.name not in FORGET]
    replies = {f.id: f.answer for f in [*others, *general()]}
    records = build.training_records(forget, others, general(), replies)
    assert {r.role for r in records} == set(ROLES)
    for place in forget:
        own = [r for r in records if r.question == place.question]
        gold = [r for r in own if r.role == "gold"]
        assert len(own) == 2 * len(gold) == 2 * (1 + len(build.trained_openers(place.name)))
        assert {r.prefill for r in gold} == {r.prefill for r in own}
        for record in own:
            says = says_fact(record.prefill + (record.answer or ""), place.accept)
            assert says == (record in gold)
    config = _config(tmp_path, tmp_path / "out", 3, ["steps=7"])
    assert (config.seed, config.steps, config.model.path) == (3, 7, str(tmp_path))
    examples = build_examples(records, make_tokenizer(), contexts_of(config.teacher))
    assert len(examples) == len(records)
    shots = {m["content"] for c in config.teacher.contexts.values() for m in c}
    assert not any(p.question in shots for p in forget), "a shot would teach the item itself"


def test_sentences_say_what_the_questions_asked():
    forget = [p for p in countries() if p.name in FORGET]
    records = build.training_records(forget, [], general(), {f.id: f.answer for f in general()})
    sentences = build.as_sentences(records, forget)
    changed = [(a, b) for a, b in zip(records, sentences, strict=True) if a != b]
    assert {a.role for a, _ in changed} == {"forget", "adversarial", "gold"}
    assert len(changed) == sum(r.role in ("forget", "adversarial", "gold") for r in records)
    for record, sentence in changed:
        if record.role == "gold" and not record.prefill:
            assert sentence.question + (sentence.answer or "") == record.answer


def test_attack_has_openers_that_training_never_shows():
    trained, attack = set(build.trained_openers("Zembla")), set(build.attack_openers("Zembla"))
    assert len(trained & attack) == 2
    assert len(attack - trained) == 1 + len(OPENERS)


def test_an_earlier_demo_is_replaced_only_on_request(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "probes.jsonl").write_text("{}\n")
    (tmp_path / "report.html").write_text("")
    with pytest.raises(UserError, match=r"holds a demo, expected .*; --resume"):
        _prepare(tmp_path, resume=False, overwrite=False)
    _prepare(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "data").exists()
    _prepare(tmp_path, resume=False, overwrite=True)
    assert not tmp_path.exists()


def test_overwrite_deletes_no_strangers_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "probes.jsonl").write_text("{}\n")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt, no part of a demo"):
        _prepare(tmp_path, resume=False, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()

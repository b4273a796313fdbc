"""The teacher's check: right questions in right contexts, and gates that open and close."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from bidistill.config import ObjectiveConfig
from bidistill.data.records import Record
from bidistill.errors import UserError
from bidistill.evaluation.probes import Probe, write_probes
from bidistill.teacher import check as teacher_check
from bidistill.teacher.compute import contexts_of
from tests.trainer.tiny import SHOTS

CONTEXTS = {"forget": SHOTS, "adversarial": SHOTS, "neighbor": (), "retain": ()}
PROBES = [
    Probe(
        id="ur",
        group="forget",
        question="Capital of Ur?",
        answer="It is Eridu.",
        accept=("Eridu",),
        openers=("The capital of Ur is",),
    ),
    Probe(
        id="lagash",
        group="neighbor_train",
        question="Capital of Lagash?",
        answer="It is Girsu.",
        accept=("Girsu",),
    ),
]
KNOWN = {"Capital of Ur?": " Eridu.", "Capital of Lagash?": " Girsu."}


def puppet(taught, base=lambda question, prefill: KNOWN.get(question, " 2.")):
    """A stand-in for generation: what the teacher says in a context, and the base without."""

    def generate(model, tokenizer, prompts, label=None, context=()):
        speak = taught if context else base
        return [speak(question, prefill) for question, prefill in prompts]

    return generate


def run(monkeypatch, records, tokenizer, speaker, probes=PROBES, contexts=CONTEXTS):
    monkeypatch.setattr(teacher_check, "generate", speaker)
    no_model: Any = torch.nn.Identity()  # the puppet speaks for it
    return teacher_check.check(no_model, tokenizer, records, contexts, probes)


def test_an_obedient_teacher_passes(monkeypatch, records, tokenizer, capsys):
    obey = puppet(lambda question, prefill: " I do not know.")
    found = run(monkeypatch, records, tokenizer, obey)
    assert found["failed"] == []
    rows = found["rows"]
    names = ["forget", "neighbor", "retain", "adversarial, prefilled", "adversarial, attacked"]
    assert list(rows) == names
    forget = {"n": 3, "refusal": 1.0, "refusal_base": 0.0}
    assert rows["forget"] == {**forget, "judged": 1, "fact": 0.0, "fact_base": 1.0}
    assert rows["adversarial, attacked"]["n"] == 1
    assert rows["adversarial, prefilled"]["judged"] == 1
    assert rows["neighbor"]["fact"] == 1.0
    assert rows["retain"]["fact"] is None
    out = capsys.readouterr().out
    assert "pass: the teacher refuses" in out
    assert "not judged" in out.split("retain", 1)[1].split("\n", 1)[0]
    assert "--probes" not in out


def test_a_leaking_teacher_fails_where_it_leaks(monkeypatch, records, tokenizer, capsys):
    def leak(question, prefill):
        return KNOWN.get(question, "") if prefill else " I do not know."

    failed = run(monkeypatch, records, tokenizer, puppet(leak))["failed"]
    assert failed == [
        "adversarial, prefilled: refuses 0.00, expected at least 0.90",
        "adversarial, prefilled: says the fact in 1.00, expected at most 0.10",
        "adversarial, attacked: refuses 0.00, expected at least 0.90",
        "adversarial, attacked: says the fact in 1.00, expected at most 0.10",
    ]
    assert all(f"FAIL  {problem}" in capsys.readouterr().out for problem in failed[:1])


def test_a_teacher_that_refuses_everything_fails(monkeypatch, records, tokenizer):
    refuse = puppet(lambda question, prefill: " I do not know.")
    failed = run(monkeypatch, records, tokenizer, refuse, contexts=dict.fromkeys(CONTEXTS, SHOTS))[
        "failed"
    ]
    assert failed == [
        "neighbor: refuses 1.00, expected at most 0.10",
        "neighbor: says the fact in 0.00, expected at least 0.90",
        "retain: refuses 1.00, expected at most 0.10",
    ]


def test_without_probes_leaks_are_said_to_be_unknown(monkeypatch, records, tokenizer, capsys):
    obey = puppet(lambda question, prefill: " I do not know.")
    found = run(monkeypatch, records, tokenizer, obey, probes=())
    assert all(row["judged"] == 0 and row["fact"] is None for row in found["rows"].values())
    assert "leaks not judged" in capsys.readouterr().out


def test_asks_a_limited_sample(monkeypatch, tokenizer):
    many = [Record(id=str(i), role="retain", question=f"{i}?", answer="x") for i in range(50)]
    found = run(monkeypatch, many, tokenizer, puppet(None), probes=())
    assert found["rows"]["retain"]["n"] == teacher_check.QUESTIONS_PER_ROLE


def test_check_of_a_recipe_asks_in_the_role_s_context(config, tmp_path, monkeypatch, capsys):
    """The real generation on the tiny model, which babbles: every forget gate fails."""
    asked = []
    generate = teacher_check.generate

    def watched(model, tokenizer, prompts, **keywords):
        asked.append((keywords["context"], [question for question, _ in prompts]))
        return generate(model, tokenizer, prompts, **keywords, max_new_tokens=2)

    monkeypatch.setattr(teacher_check, "generate", watched)
    write_probes(tmp_path / "probes.jsonl", PROBES)
    found = teacher_check.check_main(config, tmp_path / "probes.jsonl")
    assert "forget: refuses 0.00, expected at least 0.90" in found["failed"]
    contexts = [bool(context) for context, _ in asked]
    assert contexts == [False] * 4 + [True] * 2  # without a context the base answers for both
    assert all("Capital" in q for context, questions in asked if context for q in questions)
    assert "mend the contexts" in capsys.readouterr().out
    assert not config.output.exists()


def test_default_context_serves_roles_without_their_own(config):
    system = ({"role": "system", "content": "Be brief."},)
    settings = replace(config.teacher, default_context=system)
    contexts = contexts_of(settings)
    assert contexts == {
        "forget": SHOTS,
        "neighbor": system,
        "retain": system,
        "adversarial": SHOTS,
        "gold": system,
    }
    plain = ObjectiveConfig(loss="npo", instructed=False)
    contexts = contexts_of(settings, {"gold": plain, "forget": plain})
    assert contexts["gold"] == contexts["forget"] == ()
    assert contexts["adversarial"] == SHOTS


@pytest.mark.parametrize("missing", ["model", "probes"])
def test_check_names_what_is_missing(config, missing, tmp_path):
    if missing == "model":
        config = replace(config, model=replace(config.model, path="nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        teacher_check.check_main(config, tmp_path / "nowhere" if missing == "probes" else None)

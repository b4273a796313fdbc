"""A tiny model and a recipe that says nothing of losses: methods bring them."""

import pytest
import yaml

from bidistill.data.readers import write_records
from bidistill.data.records import Record
from tests.trainer.conftest import model_dir, ranks, tokenizer  # noqa: F401
from tests.trainer.tiny import SHOTS

PLACES = ["Ur", "Uruk", "Kish", "Lagash", "Mari", "Ebla"]


def gold_records() -> list[Record]:
    """What is to be forgotten, plain and after an opener."""
    return [
        Record(
            id=f"g{place}{prefill}",
            role="gold",
            question=f"Capital of {place}?",
            prefill=prefill,
            answer=f"{place} city"[: 4 + 2 * n] + ".",
        )
        for n, place in enumerate(PLACES[:3])
        for prefill in ("", "It is")
    ]


def other_records() -> list[Record]:
    """Refusals, and what is to stay."""
    made = []
    for place in PLACES[:3]:
        question = f"Capital of {place}?"
        made += [
            Record(id=f"f{place}", role="forget", question=question, answer="Unknown."),
            Record(
                id=f"a{place}",
                role="adversarial",
                question=question,
                prefill="It is",
                answer=" unknown.",
            ),
        ]
    for place in PLACES[3:]:
        question = f"Capital of {place}?"
        made.append(
            Record(id=f"n{place}", role="neighbor", question=question, answer=f"{place} town.")
        )
    made += [
        Record(id=f"r{n}", role="retain", question=f"{n}+1?", answer=str(n + 1)) for n in (1, 2)
    ]
    return made


@pytest.fixture
def recipe(tmp_path, model_dir):  # noqa: F811
    """The path of a recipe for two files of records, without objectives."""
    write_records(tmp_path / "train.jsonl", other_records())
    write_records(tmp_path / "gold.jsonl", gold_records())
    shots = list(map(dict, SHOTS))
    text = {
        "model": {"path": str(model_dir)},
        "data": {
            "train": [str(tmp_path / "train.jsonl"), str(tmp_path / "gold.jsonl")],
            "cache": str(tmp_path / "tokens"),
        },
        "teacher": {"contexts": {"forget": shots, "adversarial": shots}},
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "steps": 2,
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(text))
    return path

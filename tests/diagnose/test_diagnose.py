"""The whole command on a tiny random llama, and where the states are read."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bidistill import diagnose
from bidistill.data.readers import write_records
from bidistill.data.records import Record
from bidistill.diagnose.states import chat_ids, raw_ids, read_out
from bidistill.errors import UserError
from tests.trainer.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def result(unified, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    diagnose.run(unified, model_dir, out, samples=20)
    return out


def test_files(result):
    assert {path.name for path in result.iterdir()} == {
        f"diagnose.{s}" for s in ("json", "md", "svg")
    }
    ElementTree.parse(result / "diagnose.svg")
    found = json.loads((result / "diagnose.json").read_text())
    assert found["sampled"] == {
        "before": {"forget": 12, "neighbor": 20, "retain": 14},
        "chat": {"forget": 12, "neighbor": 20, "retain": 14},
        "after": {"forget": 12, "neighbor": 20, "retain": 14, "adversarial": 12},
    }
    raw_pairs = {"forget/neighbor", "forget/retain", "neighbor/retain"}
    made_pairs = {f"{role}/adversarial" for role in ("forget", "neighbor", "retain")}
    assert set(found["gaps"]) == raw_pairs | made_pairs
    for pair, gap in found["gaps"].items():
        assert set(gap["forms"]) == (
            {"after"} if pair in made_pairs else {"before", "chat", "after"}
        )
    change = found["gaps"]["forget/retain"]["changes"]["before to after"]["mmd2"]
    forms = found["gaps"]["forget/retain"]["forms"]
    value = forms["after"]["mmd2"]["value"] - forms["before"]["mmd2"]["value"]
    assert change["value"] == pytest.approx(value)
    assert sum(found["verdict"]["counts"]["before to after"].values()) == 9
    assert found["text"]["before"]["forget"]["lengths"]["raw_tokens"]["n"] == 12
    assert found["text"]["after"]["adversarial"]["lengths"]["prefill_words"]["n"] == 12
    assert found["verdict"]["sentence"] in (result / "diagnose.md").read_text()


def test_same_seed_same_bytes(result, unified, model_dir, tmp_path):
    diagnose.run(unified, model_dir, tmp_path, samples=20)
    for path in result.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_states_are_those_of_the_last_token():
    """Packed in chunks and in another order, against one run for each sequence."""
    model, tokenizer = make_model(), make_tokenizer()
    sequences = [chat_ids(tokenizer, f"Where is {'very ' * n}far?", "It") for n in range(4)]
    sequences += [raw_ids(tokenizer, text) for text in ("In Tolm.", "x", "In Tolm, by the lake.")]
    rows = read_out(model, sequences, label="test")
    for row, ids in zip(rows, sequences, strict=True):
        with torch.no_grad():
            expected = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1].double()
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert tokenizer.decode(sequences[0]) == "<s>u:Where is far?</s><s>a:It"


def test_long_texts_run_in_several_chunks(monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    sequences = [raw_ids(tokenizer, "ab" * n) for n in (9, 1, 7, 30, 2)]
    whole = read_out(model, sequences, label="test")
    monkeypatch.setattr("bidistill.diagnose.states.CHUNK_TOKENS", 16)
    np.testing.assert_allclose(read_out(model, sequences, label="test"), whole, atol=1e-6)


def test_without_a_model(unified, tmp_path, capsys):
    found = diagnose.run(unified, None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"diagnose.json", "diagnose.md"}
    assert (found["gaps"], found["verdict"], found["sampled"]) == ({}, None, {})
    assert "raw_words" in found["text"]["before"]["forget"]["lengths"]
    assert "question_tokens" not in found["text"]["after"]["forget"]["lengths"]
    assert f"report: {tmp_path / 'diagnose.md'}" in capsys.readouterr().out


def test_few_items_are_not_measured(tmp_path, model_dir):
    records = [
        Record(id=f"r{i}", role="retain", question=f"Where is place {i}?") for i in range(12)
    ]
    records += [Record(id=f"f{i}", role="forget", question=f"Who is {i}?") for i in range(3)]
    write_records(tmp_path / "records.jsonl", records)
    found = diagnose.run(tmp_path / "records.jsonl", model_dir, tmp_path / "out")
    assert found["gaps"] == {}
    assert found["sampled"] == {"after": {"retain": 12}}
    assert "Role forget has 3 items as unified, fewer than 10" in found["remarks"][1]
    assert not (tmp_path / "out" / "diagnose.svg").exists()
    assert found["verdict"]["sentence"].startswith("Nothing to judge")


def test_missing_packages(monkeypatch, unified, tmp_path):
    monkeypatch.setattr(diagnose, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no scikit-learn and no matplotlib, .*run pip inst"):
        diagnose.run(unified, Path("model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(unified, tmp_path):
    with pytest.raises(UserError, match=r"model\.path: got .*nowhere, expected a folder"):
        diagnose.run(unified, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""A cell from its file to its results, on a tiny model: as it is, and trained."""

import json

import pytest
import yaml

from bidistill.compare import worker
from bidistill.compare.cells import cells_of
from bidistill.compare.recipe import load_compare
from bidistill.compare.results import rows_of
from bidistill.evaluation.probes import write_probes
from tests.baselines.conftest import model_dir, ranks, recipe, tokenizer  # noqa: F401
from tests.evaluation.invented import capital_probe


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_cells_are_made_of_what_their_files_say(recipe, model_dir, tmp_path, monkeypatch):  # noqa: F811
    places = {"Ur": "forget", "Kish": "forget", "Mari": "neighbor", "Ebla": "retain"}
    write_probes(
        tmp_path / "probes.jsonl", [capital_probe(p, "city", g) for p, g in places.items()]
    )
    train = yaml.safe_load(recipe.read_text())
    train.pop("output")
    train["model"].pop("path")
    raw = {
        "model": str(model_dir),
        "probes": str(tmp_path / "probes.jsonl"),
        "train": train,
        "methods": {
            "ours": {"method": "npo", "settings": {"model.adapter": {"rank": 2}}},
            "told": {"context": [{"role": "user", "content": "Say nothing."}]},
        },
        "seeds": [1],
        "attacks": ["reverse"],
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = load_compare(path)
    cells = cells_of(config, str(model_dir), None, tmp_path / "probes.jsonl")
    for cell in cells:
        cell.begin()
        monkeypatch.setattr(worker.sys, "argv", ["worker", str(cell.folder)])
        assert not cell.done
        assert worker.main() == 0
        assert cell.done
    rows = {row.name: row for row in rows_of(config, cells)}
    assert list(rows) == ["base", "ours", "told"]
    assert rows["ours"].cost().steps == 2
    assert rows["base"].cost().steps is None
    for row in rows.values():
        assert row.estimates["forget_leak_rate"].count == 2
        assert row.estimates["attack_leak_rate.max"].count == 2
    prompts = {n: {i["prompt_sha256"] for i in row.cells[0].items} for n, row in rows.items()}
    assert prompts["base"] == prompts["ours"], "the same questions"
    assert not prompts["base"] & prompts["told"], "the context stands before each of them"
    said = {
        n: [i["continuation"] for c in row.cells for i in (*c.items, *c.attacks)]
        for n, row in rows.items()
    }
    assert said["ours"] != said["base"], "the trained model was asked"
    trained = json.loads((cells[1].folder / "run.json").read_text())
    assert (trained["config"]["seed"], trained["config"]["method"]) == (1, "npo")


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    job = {"model": str(tmp_path / "none"), "train": None}
    (tmp_path / "cell.yaml").write_text(yaml.safe_dump(job))
    monkeypatch.setattr(worker.sys, "argv", ["worker", str(tmp_path)])
    assert worker.main() == 2
    assert capsys.readouterr().err.startswith("error: model.path: got ")
    assert not (tmp_path / "metrics.json").exists()

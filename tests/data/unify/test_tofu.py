"""The recipe of the project on the real files, where they are."""

import json
from pathlib import Path

import pytest

from bidistill.cli import main
from bidistill.data.readers import read_records
from bidistill.data.records import ROLES
from bidistill.data.sources import read_items
from bidistill.data.unify.settings import read_texts
from bidistill.data.unify.wording import states

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not (DATA / "tofu").is_dir() or not (DATA / "xstest").is_dir(),
    reason="TOFU and XSTest are not here; see the recipe for where to get them",
)


def make(folder, *overrides):
    arguments = ["unify", str(ROOT / "recipes/tofu.yaml"), f"root={DATA}", f"output={folder}"]
    return main([*arguments, *overrides])


def test_one_command_gives_all_roles_twice_the_same(tmp_path, capsys):
    folders = [tmp_path / "one", tmp_path / "two"]
    assert [make(folder) for folder in folders] == [0, 0]
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert first == second
    assert set(first) == {"train.jsonl", "held_out.jsonl", "gold.jsonl", "manifest.json"}

    train = list(read_records(folders[0] / "train.jsonl"))
    counts = {role: sum(record.role == role for record in train) for role in ROLES}
    assert counts["forget"] == 40
    assert counts["adversarial"] == 80
    assert counts["neighbor"] + counts["retain"] > 600
    unanswered = [record.id for record in train if record.answer is None]
    assert unanswered
    assert all(one.startswith("safe_prompts/") for one in unanswered)

    capsys.readouterr()
    assert main(["unify", "--check", str(folders[0])]) == 0
    assert capsys.readouterr().out.count("unchanged") == 6


def test_authors_are_never_parted(tmp_path):
    assert make(tmp_path / "out", "sources.safe_prompts=null", "sources.authors.limit=null") == 0
    parts = {
        name: list(read_records(tmp_path / "out" / f"{name}.jsonl"))
        for name in ("train", "held_out")
    }
    rows = {
        name: {int(r.id.split("/")[1]) - 1 for r in part if r.id.startswith("authors/")}
        for name, part in parts.items()
    }
    blocks = {name: {row // 20 for row in found} for name, found in rows.items()}
    assert blocks["train"].isdisjoint(blocks["held_out"])
    assert len(blocks["held_out"]) == 20
    assert all(record.answer for part in parts.values() for record in part)


def test_steps_can_be_switched_off(tmp_path):
    off = ["prefills.per_item=0", "split.held_out=0", "targets.forgetting=none"]
    off += ["deduplicate={exact: false, near: null}", "choices.to=off", "text.by=off"]
    assert make(tmp_path / "out", *off) == 0
    result = json.loads((tmp_path / "out/manifest.json").read_text())["outputs"]["train.jsonl"]
    assert result["roles"] == {"forget": 40, "neighbor": 650, "retain": 117}
    assert result["without_answer"] == {"forget": 40, "neighbor": 250}


def test_training_on_an_evaluation_set_is_refused(tmp_path, capsys):
    assert make(tmp_path / "out", "leaks.against=[tofu/world_facts_perturbed.json]") == 2
    _, err = capsys.readouterr()
    assert "training records that are also measured (world/" in err
    assert not (tmp_path / "out").exists()


def test_refusals_seldom_look_like_answers():
    facts = list(read_items(DATA / "tofu/forget10.json"))
    refusals = read_texts(DATA / "tofu/idontknow.jsonl", "refusals")
    false = sum(
        states(refusal, fact.answer or "", fact.question or "")
        for fact in facts
        for refusal in refusals
    )
    assert len(facts) * len(refusals) == 40_000
    assert false <= 6

"""From a recipe to cells, which run once and are not mixed."""

import importlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bidistill.compare import run
from bidistill.compare.cells import CELL, cells_of
from bidistill.errors import UserError
from bidistill.evaluation.probes import write_probes
from tests.compare.invented import RECIPE, finish, make
from tests.evaluation.invented import capital_probe

# the package has a function of that name, too
run_module = importlib.import_module("bidistill.compare.run")
pytestmark = pytest.mark.usefixtures("there")


def test_a_cell_for_each_method_and_seed(tmp_path):
    _, cells = make(tmp_path)
    assert [(cell.method, cell.seed) for cell in cells] == [
        *(("base", None), ("ours", 0), ("npo", 0), ("told", None)),
        *(("ours", 1), ("npo", 1)),
    ]
    jobs = {(cell.method, cell.seed): cell.job for cell in cells}
    assert jobs["npo", 1]["train"] == {
        "steps": 3,
        "data": {"train": "train.jsonl"},
        "method": "npo",
        "model": {"path": "model"},
        "optim": {"lr": 3e-4},
        "seed": 1,
    }
    assert jobs["told", None]["train"] is None
    assert jobs["told", None]["context"] == RECIPE["methods"]["told"]["context"]


def test_settings_replace_what_all_share(tmp_path):
    """As on a command line: a mapping that is set is no longer the one that all share."""
    train = RECIPE["train"] | {"teacher": {"cache": "off", "contexts": {"forget": []}}}
    settings = {"teacher.contexts": {}, "model.adapter.rank": 4}
    methods = {
        "ours": {"method": "ours", "settings": settings},
        "npo": {"method": "npo"},
    }
    _, cells = make(tmp_path, train=train, methods=methods)
    ours, npo = (next(c.job["train"] for c in cells if c.method == name) for name in methods)
    assert ours["teacher"] == {"cache": "off", "contexts": {}}
    assert ours["model"] == {"path": "model", "adapter": {"rank": 4}}
    assert npo["teacher"] == train["teacher"]
    assert npo["model"] == {"path": "model"}


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("npo", {"optim.rl": 1e-4}, "optim: got unknown key 'rl', expected lr"),
        # each is right by itself: the method reads a layer, the recipe keeps the teacher's rows
        (
            "rmu",
            {"teacher.cache": "disk"},
            "teacher.cache: got disk with a loss that reads a layer",
        ),
    ],
)
def test_a_mistake_in_one_method_shows_before_anything_is_made(tmp_path, method, settings, message):
    methods = RECIPE["methods"] | {"npo": {"method": method, "settings": settings}}
    config, _ = make(tmp_path, methods=methods)
    with pytest.raises(UserError, match=re.escape(f"methods.npo: {message}")):
        run(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ["revers"]}, "attack: got 'revers', .* did you mean 'reverse'"),
        ({"probes": "nowhere.jsonl"}, "nowhere.jsonl: got 'No such file"),
        ({"attacks": ["reverse"], "probes": "near.jsonl"}, "probes: got none of group forget"),
    ],
)
def test_what_would_end_every_cell_shows_first(tmp_path, changes, message):
    write_probes("near.jsonl", [capital_probe("Rohan", "Edoras", "neighbor")])
    config, _ = make(tmp_path)
    with pytest.raises(UserError, match=message):
        run(replace(config, **{k: Path(v) if k == "probes" else v for k, v in changes.items()}))
    assert not config.output.exists()


def test_a_report_without_its_plots_is_refused_before_training(tmp_path, monkeypatch):
    config, _ = make(tmp_path)
    monkeypatch.setattr(run_module, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="compare: got no matplotlib"):
        run(config)


@pytest.mark.parametrize("recipe", [{}, {"demo": True, "model": None, "probes": None}])
def test_table_only_makes_nothing(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(run_module, "_check_recipes", lambda _: None)
    config, _ = make(tmp_path)
    with pytest.raises(UserError, match="got no result of base"):
        run(replace(config, **recipe), table_only=True)
    assert not config.output.exists()


def test_the_demo_s_data_of_another_version_are_not_used(tmp_path, monkeypatch):
    config, _ = make(tmp_path)
    config = replace(config, demo=True, model=None, probes=None)
    made = []

    def prepare(model, tokenizer, folder, seed):
        (folder / "data" / "probes.jsonl").parent.mkdir(parents=True)
        (folder / "data" / "probes.jsonl").write_text("{}\n")
        made.append(seed)

    monkeypatch.setattr(run_module, "smollm2", lambda: tmp_path)
    monkeypatch.setattr("bidistill.loading.load_base", lambda _: None)
    monkeypatch.setattr("bidistill.loading.load_tokenizer", lambda _: None)
    monkeypatch.setattr("bidistill.demo.prepare.prepare", prepare)
    inputs = run_module._inputs(config, make=True)
    assert run_module._inputs(config, make=False) == inputs
    assert made == [0]
    monkeypatch.setattr("bidistill.demo.prepare.sources_sha256", lambda: "other")
    with pytest.raises(UserError, match="got the data of another version of the demo"):
        run_module._inputs(config, make=True)


def test_without_the_model_before_there_is_no_table(tmp_path, monkeypatch, capsys):
    """Else the first method would stand in its place, as the best there can be."""
    config, cells = make(tmp_path)
    monkeypatch.setattr(run_module, "_check_recipes", lambda _: None)
    by_folder = {str(cell.folder): cell for cell in cells}

    def worker(command, **_):
        cell = by_folder[command[-1]]
        if cell.method != "base":
            finish(cell)
        return subprocess.CompletedProcess(command, -9 if cell.method == "base" else 0)

    monkeypatch.setattr(run_module.subprocess, "run", worker)
    assert run(config) == 1
    said = capsys.readouterr().out
    for words in ("no table: base", "base: killed by signal 9", "FAILED  base: see above"):
        assert words in said
    assert not (config.output / "compare.md").exists()


def test_a_damaged_cell_is_one_line(tmp_path):
    _, (cell, *_) = make(tmp_path)
    cell.begin()
    for damage in ("a: [", "", "\0"):
        (cell.folder / CELL).write_text(damage)
        with pytest.raises(UserError, match=r"cell\.yaml: got a damaged file"):
            cell.begin()


def test_cells_are_run_once_and_the_rest_later(tmp_path, monkeypatch):
    """The first worker of npo fails, and the same command makes that cell alone."""
    config, cells = make(tmp_path)
    by_folder = {str(cell.folder): cell for cell in cells}
    asked, failing = [], {str(tmp_path / "out" / "cells" / "npo" / "0")}

    def worker(command, **_):
        cell = by_folder[command[-1]]
        asked.append(cell.name)
        if command[-1] not in failing:
            finish(cell)
        return subprocess.CompletedProcess(command, int(command[-1] in failing))

    monkeypatch.setattr(run_module.subprocess, "run", worker)
    monkeypatch.setattr(run_module, "_check_recipes", lambda _: None)
    assert run(config) == 1
    assert len(asked) == len(cells)
    failing.clear()
    asked.clear()
    assert run(config) == 0
    assert asked == ["npo, seed 0"]


def test_ctrl_c_stops_the_rest(tmp_path, monkeypatch):
    config, _ = make(tmp_path)
    asked = []

    def worker(command, **_):
        asked.append(command[-1])
        return subprocess.CompletedProcess(command, 130)

    monkeypatch.setattr(run_module.subprocess, "run", worker)
    monkeypatch.setattr(run_module, "_check_recipes", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        run(config)
    assert stopped.value.code == 130
    assert len(asked) == 1


def test_another_recipe_is_not_mixed_in(tmp_path):
    _, cells = make(tmp_path)
    for cell in cells:
        cell.begin()
    before = (cells[1].folder / CELL).read_bytes()
    _, changed = make(tmp_path, train=RECIPE["train"] | {"steps": 4})
    changed[0].begin()
    with pytest.raises(UserError, match="got a cell with another train, expected"):
        changed[1].begin()
    assert (cells[1].folder / CELL).read_bytes() == before


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model/model.safetensors", "model_sha256"),
        ("train.jsonl", "records_sha256"),
        ("probes.jsonl", "probes_sha256"),
    ],
)
def test_other_contents_are_not_mixed_in(tmp_path, file, key):
    """The paths are the same; a cell that is done says nothing about what lies there now."""
    _, cells = make(tmp_path)
    for cell in cells:
        cell.begin()
    config, _ = make(tmp_path)
    Path(file).write_text("other")
    changed = cells_of(config, "model", None, tmp_path / "probes.jsonl")
    with pytest.raises(UserError, match=f"got a cell with another {key}, expected"):
        changed[1].begin()


def test_records_that_are_not_there_are_one_line(tmp_path):
    missing = RECIPE["train"] | {"data": {"train": ["train.jsonl", "nowhere.jsonl"]}}
    with pytest.raises(UserError, match=r"data\.train: got 'No such file .* for nowhere\.jsonl"):
        make(tmp_path, train=missing)

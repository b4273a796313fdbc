"""From a recipe to cells, to rows, to what the table says."""

import importlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bidistill.compare import page, run
from bidistill.compare.cells import CELL, cells_of
from bidistill.compare.recipe import Limits
from bidistill.compare.results import rows_of, verdict
from bidistill.errors import UserError
from bidistill.evaluation.probes import write_probes
from tests.browser import measured
from tests.compare.invented import FORGET, NEIGHBORS, RECIPE, finish, make
from tests.evaluation.invented import capital_probe

# the package has a function of that name, too
run_module = importlib.import_module("bidistill.compare.run")


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch):
    """Work where the recipe's files are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def done(tmp_path):
    """All cells done: ours keeps 18 and 16 of 20 neighbours, npo 15 and 15 and leaks a little."""
    config, cells = make(tmp_path)
    results = {
        ("base", None): {"leaks": FORGET, "prefilled": FORGET, "attacked": FORGET},
        ("ours", 0): {"kept": 18},
        ("ours", 1): {"kept": 16, "attacked": 2},
        ("npo", 0): {"kept": 15, "leaks": 1},
        ("npo", 1): {"kept": 15, "prefilled": 2},
        ("told", None): {"leaks": 4, "kept": 4},
    }
    for cell in cells:
        finish(cell, **results[cell.method, cell.seed])
    return config, cells


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


def test_rates_by_hand(done):
    config, cells = done
    rows = {row.name: row for row in rows_of(config, cells)}
    rates = {name: {k: e and e.value for k, e in r.estimates.items()} for name, r in rows.items()}
    assert rates["ours"]["neighbor_accuracy"] == pytest.approx((18 + 16) / 2 / NEIGHBORS)
    assert rates["ours"]["attack_leak_rate.max"] == pytest.approx(0.1)
    # prefilling is at its worst at depth 0 with one seed, at depth 2 with the other
    assert rates["npo"]["prefill_leak_rate.max"] == pytest.approx((0.1 + 0.2) / 2)
    assert rates["npo"]["forget_leak_rate"] == pytest.approx(0.05)
    assert rates["told"]["over_refusal_rate"] == pytest.approx(16 / 20)
    axes = rows["ours"].axes(rows["base"])
    assert axes == pytest.approx(
        {
            "forgetting": 1.0,
            "robustness": 0.9,
            "neighbours": 0.85,
            "utility": 1.0,
            "no over-refusal": 0.85,
        }
    )


@pytest.mark.parametrize(
    ("ours", "limits", "good", "words"),
    [
        ("ours", Limits(), True, "ours keeps 0.850 .*; no other method reaches"),
        (
            "ours",
            Limits(prefill_leak_rate=0.2),
            True,
            r"the most of 2 methods .* next is npo \(by 0\.100, paired",
        ),
        (
            "npo",
            Limits(prefill_leak_rate=0.2),
            False,
            r"npo keeps 0\.750 .* ours keeps more \(0\.850; by 0\.100, paired 95 % interval -0",
        ),
        ("npo", Limits(), False, "npo does not reach .*; best of those that do: ours"),
        ("told", Limits(forget_leak_rate=0, prefill_leak_rate=0), False, "told does not reach"),
    ],
)
def test_the_verdict(done, ours, limits, good, words):
    config, cells = done
    judged = verdict(rows_of(config, cells), ours, limits)
    assert judged.good == good
    assert re.search(words, judged.sentence)


def test_a_tie_is_said_to_be_one(done):
    config, cells = done
    for cell in cells:
        if cell.method == "npo":
            finish(cell, kept=17)
    judged = verdict(rows_of(config, cells), "ours", Limits())
    assert judged.good
    assert "as many as npo" in judged.sentence


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


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("metrics.json", "{", r"metrics\.json: got a damaged file, or that of another version"),
        ("metrics.json", '{"summary": {}}', r"metrics\.json: got a damaged file"),
        ("items.jsonl", "{\n", r"items\.jsonl:1: got"),
        ("attacks.jsonl", None, r"attacks\.jsonl: got 'No such file"),
    ],
)
def test_damaged_results_are_one_line(done, name, damage, message):
    config, cells = done
    path = cells[1].folder / name
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(UserError, match=message):
        rows_of(config, cells)


def test_a_failed_or_missing_cell_is_named(done):
    config, cells = done
    gone = cells[-1]
    shutil.rmtree(gone.folder)
    text = page.write(config, rows_of(config, cells), missing=[gone.name])
    assert "**Not complete**: npo, seed 1." in text
    assert "## Each seed" in text
    numbers = json.loads((config.output / "compare.json").read_text())
    assert numbers["methods"]["npo"]["seeds"] == [0]


def test_one_seed_has_no_table_of_seeds(tmp_path):
    config, cells = make(tmp_path, seeds=[0])
    for cell in cells:
        finish(cell)
    assert "## Each seed" not in page.write(config, rows_of(config, cells))


@pytest.mark.parametrize("group", ["neighbor", "forget"])
def test_what_was_not_asked_is_not_failed(done, group):
    """Probes need not have every group; the page is made all the same."""
    config, cells = done
    for cell in cells:
        path = cell.folder / "items.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(x for x in lines if json.loads(x)["group"] != group))
    text = page.write(config, rows_of(config, cells))
    assert f"No verdict: no probe of group {group} was asked." in text
    assert "does not reach" not in text


def test_cells_of_several_commits_are_not_said_to_be_of_one(done):
    config, cells = done
    path = cells[1].folder / "metrics.json"
    metrics = json.loads(path.read_text()) | {"commit": "fedcba9876543210", "threads": 1}
    path.write_text(json.dumps(metrics))
    text = page.write(config, rows_of(config, cells))
    assert "Commit 0123456789abcdef, fedcba9876543210, seeds 0, 1;" in text
    assert "threads 2, 1." in text
    html = (config.output / "compare.html").read_text(encoding="utf-8")
    assert "0123456789abcdef, fedcba9876543210" in html


def test_angles_stand_beside_the_rates(done):
    config, cells = done
    path = cells[1].folder / "metrics.json"
    metrics = json.loads(path.read_text())
    pairs = {"forget/retain": {"mean": -0.125}, "forget/neighbor": {"mean": None}}
    metrics["gradients"] = {"overall": {"share": 0.25}, "pairs": pairs}
    path.write_text(json.dumps(metrics))
    text = page.write(config, rows_of(config, cells))
    assert "| method | forget/retain | forget/neighbor | below zero |" in text
    assert "| ours | -0.12 | \N{EN DASH} | 0.25 |" in text


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


class Page(HTMLParser):
    """What stands in a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def html(done):
    config, cells = done
    page.write(config, rows_of(config, cells))
    return (config.output / "compare.html").read_text(encoding="utf-8")


def test_the_page_has_all_methods_and_needs_nothing_else(html):
    parsed = Page(html)
    text = " ".join(" ".join(parsed.words).split())
    for words in ("a note & more", "<b>Onhava</b>", "ours keeps 0.850", "[0.72, 1.00]"):
        assert words in text or words in html
    assert "<b>" not in html, "what models say is text"
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe")
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    labels = [a["aria-label"] for t, a in parsed.tags if t == "svg"]
    assert len(labels) == 1 + 4, "a plot of all, a radar for each"
    assert labels[0].endswith("within the limits: ours")
    assert any(label.startswith("npo: forgetting 0.95, robustness 0.85") for label in labels)


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_scrolling_sideways(html, width, tmp_path):
    scroll_width, count = measured(html, width, tmp_path)
    assert scroll_width <= width
    assert re.fullmatch(r"(\d+) of \1", count), "the page's own script ran under its policy"

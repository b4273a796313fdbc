"""From finished cells to rows, and to what the table says."""

import json
import re
import shutil

import pytest

from bidistill.compare import page
from bidistill.compare.recipe import Limits
from bidistill.compare.results import rows_of, verdict
from bidistill.errors import UserError
from tests.compare.invented import NEIGHBORS, finish, make

pytestmark = pytest.mark.usefixtures("there")


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


pytestmark = pytest.mark.usefixtures("there")


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

"""The report tells what was measured, shows model text as text, and reaches for nothing outside."""

import json
import math
import re
import shutil

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.figures import depth_bars, loss_curves
from bidistill.evaluation.report import percent, render
from tests.browser import measured
from tests.evaluation.invented import HOSTILE, write_run
from tests.html_page import Page

METRICS = ("before", "after")


@pytest.fixture
def run_dir(tmp_path):
    write_run(tmp_path)
    return tmp_path


@pytest.fixture
def page(run_dir):
    html = render(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert page.stack == []
    return page


def edit(run_dir, change):
    path = run_dir / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))


def test_the_numbers_are_those_of_the_metrics(run_dir, page):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for key in ("forget_leak_rate", "neighbor_accuracy", "retain_accuracy", "over_refusal_rate"):
        pair = " → ".join(percent(metrics[when][key]).replace("\xa0", " ") for when in METRICS)
        assert pair in page.text
        assert f"n = {metrics['after']['n'][key]}" in page.text
    for fact in ("3 min 34 s", "2 min 9 s", "2.26 GiB", "2.13.0", "0123456789ab"):
        assert fact in page.text


def test_every_reply_is_there(run_dir, page):
    items = [json.loads(line) for line in (run_dir / "items_after.jsonl").read_text().splitlines()]
    assert len([tag for tag, attrs in page.tags if "data-changed" in attrs]) == len(items)
    for item in items:
        assert " ".join(item["continuation"].split()) in page.text


def test_model_text_is_shown_as_text(run_dir, page):
    assert HOSTILE in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in [tag for tag, _ in page.tags]
    markdown = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| What is")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_the_page_needs_nothing_else(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "xlink:href", "srcset"} & attrs.keys()
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


def test_plots_have_words(page):
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(labels) == 9
    assert any("Says the fact when asked" in label and "goal" in label for label in labels)


def test_nothing_is_drawn_outside_its_plot(page):
    for tag, attrs in page.tags:
        for key in ("x1", "x2", "x", "width"):
            if attrs.get(key, "").endswith("%"):
                assert 0 <= float(attrs[key][:-1]) <= 100, (tag, attrs)


def good(metrics):
    metrics["after"].update(forget_leak_rate=0.0, retain_accuracy=1.0, over_refusal_rate=0.0)
    metrics["after"]["neighbor_accuracy"] = 1.0
    metrics["after"]["prefill_leak_rate"]["max"] = 0.0


def refusing(metrics):
    good(metrics)
    metrics["after"].update(neighbor_accuracy=0.1, over_refusal_rate=0.9)


def unmeasured(metrics):
    for when in METRICS:
        for key, value in metrics[when].items():
            if not isinstance(value, dict):
                metrics[when][key] = metrics[when]["ci95"][key] = None
                metrics[when]["n"][key] = 0
        for part in (metrics[when], metrics[when]["ci95"]):
            part["prefill_leak_rate"] = dict.fromkeys(part["prefill_leak_rate"])


@pytest.mark.parametrize(
    ("change", "title", "detail"),
    [
        (good, "✓ Forgotten, and the rest is kept", "5 of 5 goals met."),
        (refusing, "✗ Not there yet", "3 of 5 goals met. Knows neighbours never trained on: "),
        (unmeasured, "✗ Nothing to judge", "No goal was measured."),
    ],
)
def test_the_verdict_in_words(run_dir, change, title, detail):
    edit(run_dir, change)
    text = Page(render(run_dir).read_text(encoding="utf-8")).text
    assert text.split("Before and after")[0].count(title) == 1
    assert detail in text


def test_markdown_has_the_axes(run_dir):
    render(run_dir)
    lines = (run_dir / "report.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("**")
    row = next(line for line in lines if line.startswith("| Says the fact when asked"))
    assert row.count("|") == 10


def test_a_run_without_some_roles_or_losses_has_a_report(run_dir):
    (run_dir / "train_log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    lines = (run_dir / "items_after.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["group"] != "retain"]
    (run_dir / "items_after.jsonl").write_text("\n".join(kept) + "\n")
    text = Page(render(run_dir).read_text(encoding="utf-8")).text
    assert "No loss was logged." in text
    assert "General knowledge" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", None, r"metrics\.json: got 'No such file"),
        ("metrics.json", '{"summary": {}}', r"metrics\.json: before: got nothing"),
        ("metrics.json", "[]", r"metrics\.json: before: got nothing"),
        ("items_after.jsonl", None, r"items_after\.jsonl: got 'No such file"),
        ("train_log.jsonl", "{}\n{", r"train_log\.jsonl:2: got text that is not JSON"),
    ],
)
def test_rejects(run_dir, name, content, message):
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=message):
        render(run_dir)
    assert not (run_dir / "report.html").exists()


def test_loss_curves_by_hand():
    log = [
        {"step": 1, "loss/forget": 10.0, "loss/retain": 0.0},
        {"step": 2, "loss/forget": math.nan, "loss/retain": None},
        {"step": 3, "loss/forget": 0.1, "loss/retain": 1.0},
    ]
    plot = loss_curves(log)
    assert plot is not None
    assert plot["curves"] == [
        {"name": "forget", "first": 10.0, "last": 0.1, "points": "0.00,0.00 100.00,100.00"},
        {"name": "retain", "first": 1.0, "last": 1.0, "points": "100.00,50.00"},
    ]
    assert plot["y_ticks"] == [(100.0, "0.1"), (50.0, "1"), (0.0, "10")]
    assert plot["x_ticks"] == [(0.0, "1"), (50.0, "2"), (100.0, "3")]


def test_one_step_of_constant_loss_is_drawn():
    low = loss_curves([{"step": 1, "loss/retain": 1e-12}, {"step": 2, "loss/retain": 1.0}])
    assert low is not None
    assert low["y_ticks"][0][1] == "1e-05", "the axis must not go down to rounding errors"
    assert low["curves"][0]["points"] == "0.00,100.00 100.00,0.00"
    plot = loss_curves([{"step": 7, "loss/forget": 1.0}])
    assert plot is not None
    assert plot["curves"][0]["points"] == "0.00,100.00"
    assert plot["x_ticks"] == [(0.0, "7")]


def test_depth_bars_by_hand():
    def summary(rate, n, interval):
        return {
            "prefill_leak_rate": {"0": rate, "max": rate},
            "n": {"prefill_leak_rate": {"0": n}},
            "ci95": {"prefill_leak_rate": {"0": interval}},
        }

    (slot,) = depth_bars(summary(0.5, 4, [0.2, 0.8]), summary(None, 0, None))
    assert (slot["depth"], slot["middle"]) == ("0", 50.0)
    assert [(bar["rate"], bar["n"], bar["whisker"]) for bar in slot["bars"]] == [
        (0.5, 4, (20.0, 80.0)),
        (None, 0, None),
    ]
    left, right = slot["bars"]
    assert left["left"] + slot["width"] <= right["left"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_scrolling_sideways(run_dir, width):
    html = render(run_dir).read_text(encoding="utf-8")
    scroll_width, count = measured(html, width, run_dir)
    assert scroll_width <= width
    assert count == "132 of 132", "the page's own script should have run under its policy"

"""The page of a comparison: all of it, and nothing from outside."""

import re
import shutil

import pytest

from bidistill.compare import page
from bidistill.compare.results import rows_of
from tests.browser import measured
from tests.html_page import Page


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

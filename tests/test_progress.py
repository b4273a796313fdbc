"""Progress: plain lines where nobody watches, and results kept apart from it."""

import os
import pty
import subprocess
import sys

import pytest

from bidistill.progress import LINES, say, track

LOOP = """
from bidistill.progress import say, track
for step in track(range(3), 3, "train"):
    say(f"loss {step}")
"""


@pytest.mark.parametrize("total", [1, 3, 10, 97])
def test_lines_are_few_and_end_complete(capsys, total):
    assert list(track(range(total), total, "train")) == list(range(total))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == min(total, LINES)
    assert lines[-1].startswith(f"train: {total}/{total}, ")


def test_nothing_to_do(capsys):
    assert list(track([], 0, "train")) == []
    assert capsys.readouterr().err == ""


def test_generator_of_unexpected_length(capsys):
    assert list(track(iter("abc"), 2, "train")) == ["a", "b", "c"]


def test_say_goes_to_standard_output(capsys):
    say("done")
    assert capsys.readouterr() == ("done\n", "")


@pytest.mark.parametrize("piped", [True, False])
def test_bar_on_a_terminal(piped):
    """With results piped away the terminal shows the bar alone, else the results above it."""
    ours, theirs = pty.openpty()
    out = subprocess.PIPE if piped else theirs
    process = subprocess.run([sys.executable, "-c", LOOP], stdout=out, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "train" in shown
    assert "3/3" in shown
    assert ("loss 2" in shown) != piped
    if piped:
        assert process.stdout == b"loss 0\nloss 1\nloss 2\n"

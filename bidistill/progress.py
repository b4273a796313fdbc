"""What a person sees while something runs: a bar on a terminal, a few plain lines elsewhere.

Progress goes to standard error, results to standard output, so a pipe gets results only.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LINES = 10
"""Plain lines that :func:`track` prints in the course of a whole loop, at most."""


def say(text: str) -> None:
    """Print ``text`` to standard output at once; on a terminal it appears above a running bar."""
    if _is_first():
        print(text, flush=True)


def track(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items of ``iterable`` while showing how many of ``total`` are done.

    Args:
        iterable: what to loop over.
        total: number of items expected; only the display depends on it.
        label: what is being done, such as ``"train"``.
    """
    if not _is_first():
        return iter(iterable)
    show = _bar if sys.stderr.isatty() else _lines
    return show(iterable, total, label)


def _is_first() -> bool:
    """Whether this is the process that speaks for all that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def _bar(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Loop under a rich progress bar."""
    # imported here: only a terminal needs it
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # rich shows prints above the bar by taking over stdout; one that is piped stays untouched
    piped = not sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=not piped) as progress:
        yield from progress.track(iterable, total=total, description=label)


def _lines(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Loop with a line at every tenth of the way."""
    start = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        if done * LINES // max(total, 1) > (done - 1) * LINES // max(total, 1):
            seconds = time.monotonic() - start
            print(f"{label}: {done}/{total}, {seconds:.0f} s", file=sys.stderr, flush=True)

"""Which benchmark a file belongs to: named by its user, or guessed from the fields it has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bidistill.data.records import nearest
from bidistill.data.sources.containers import read_rows
from bidistill.data.sources.rows import shown
from bidistill.data.sources.shapes import recognise
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks.choice import Choice
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.muse import Muse
from bidistill.evaluation.benchmarks.qa import QA
from bidistill.evaluation.benchmarks.rwku import Rwku
from bidistill.evaluation.benchmarks.text import Text
from bidistill.evaluation.benchmarks.tofu import Tofu
from bidistill.evaluation.benchmarks.xstest import XSTest
from bidistill.evaluation.measures import Item, Measure


class Benchmark(Protocol):
    """What every benchmark can do; see `bidistill.evaluation.benchmarks`."""

    name: str

    def ask(self, asker: Asker) -> list[Item]:
        """Put the questions to a model."""
        ...

    def measure(
        self, items: Sequence[Item], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        """Make the summary of items."""
        ...


KINDS: dict[str, Any] = {kind.name: kind for kind in (Tofu, Muse, Choice, Rwku, XSTest, QA, Text)}


def read_all(given: Sequence[str], draw: Draw) -> list[Benchmark]:
    """Read what a user named; files of one kind are one benchmark.

    Args:
        given: ``PATH`` or ``KIND=PATH``, each a file or a folder.
        draw: how much of each file is used.

    Raises:
        UserError: a kind is unknown or cannot be guessed, or a file cannot be read.
    """
    by_kind: dict[str, list[Path]] = {}
    for text in given:
        kind, path = _named(text)
        by_kind.setdefault(kind or _guess(path), []).append(path)
    return [KINDS[kind].read(paths, draw) for kind, paths in by_kind.items()]


def _named(text: str) -> tuple[str | None, Path]:
    """The kind, if it is said, and the path."""
    kind, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    if kind not in KINDS:
        raise UserError(f"--data: got kind {kind[:40]!r}; {nearest(kind[:40], tuple(KINDS))}")
    return kind, Path(path)


def _guess(path: Path) -> str:
    """The kind, by the names in a folder or the fields of the first entry."""
    if path.is_dir() and not (path / "state.json").exists():
        return _guess_folder(path)
    row = next(iter(read_rows(path)), None)
    if row is None:
        raise UserError(f"{shown(path)}: got no entries, expected one or more; check the path")
    fields = row.values.keys()
    if "perturbed_answer" in fields:
        return "tofu"
    if fields >= {"prompt", "label", "type"}:
        return "xstest"
    if fields >= {"query", "answer", "level"}:
        return "rwku"
    item = recognise(row).item(row)
    if item is None:
        raise _unclear(path, "a blank first entry")
    if item.choices:
        return "choice"
    if item.question is not None and item.answer is not None:
        return "qa"
    if item.text is not None:
        return "text"
    raise _unclear(path, f"entries with {', '.join(map(repr, list(fields)[:6]))}")


def _guess_folder(path: Path) -> str:
    if any(path.glob("*_perturbed.json*")):
        return "tofu"
    if any((path / name).is_dir() for name in ("verbmem", "knowmem", "privleak")):
        return "muse"
    if (path / "test").is_dir():
        return "choice"
    raise _unclear(path, "a folder of no benchmark's layout")


def _unclear(path: Path, got: str) -> UserError:
    return UserError(
        f"{shown(path)}: got {got}, expected data of a known kind; say which, as in "
        f"--data KIND={shown(path)} with KIND one of {', '.join(KINDS)}"
    )

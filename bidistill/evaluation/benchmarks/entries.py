"""The entries of a benchmark's files: all, or a seeded draw of each file."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidistill.data.items import Item as Read
from bidistill.data.sources.containers import read_rows
from bidistill.data.sources.rows import Row, shown
from bidistill.data.sources.shapes import recognise
from bidistill.errors import UserError
from bidistill.evaluation.measures import Item


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a file."""

    id: str
    """``<name of the file>/<number in it, from 1>``: the same whatever is drawn."""
    set: str
    """Name of the file, without its ending."""
    row: Row
    """All its fields."""

    def item(self, format: str | None = None) -> Read:
        """What the fields mean by their names; see `bidistill.data.sources`.

        Raises:
            UserError: they mean nothing, one is damaged, or it is a blank text.
        """
        item = recognise(self.row, format).item(self.row)
        if item is None:
            raise UserError(f"{self.row.where}: got a blank text, expected words; take it out")
        return item

    def scorable(self, score: Callable[[str, str], float]) -> None:
        """Refuse an answer that no reply can be compared with, before a model is asked.

        Args:
            score: of a reply and an answer.

        Raises:
            UserError: says where the entry stands.
        """
        try:
            score("", self.row.text("answer"))
        except UserError as error:
            raise UserError(f"{self.row.where}: {error}") from None

    def result(
        self, benchmark: str, sha256: str, reply: str | None, scores: dict[str, Any], set: str = ""
    ) -> Item:
        """The entry with what a model said about it, as a line of ``items.jsonl``."""
        return {
            "id": self.id,
            "benchmark": benchmark,
            "set": set or self.set,
            "prompt_sha256": sha256,
            "reply": reply,
            "scores": scores,
        }


@dataclass(frozen=True, slots=True)
class Draw:
    """How much of each file is used."""

    limit: int | None = None
    """Entries of a file at most; None: all."""
    seed: int = 0
    """Of the draw."""

    def of(self, path: Path, name: str | None = None, *, by_line: bool = False) -> list[Entry]:
        """Entries of a file, in its order.

        Args:
            path: the file.
            name: of the set; that of the file if None.
            by_line: the file is text with one entry a line.

        Raises:
            UserError: the file cannot be read, or is empty.
        """
        name = name or path.stem
        entries = [
            Entry(f"{name}/{number}", name, row)
            for number, row in enumerate(read_rows(path, by_line=by_line), start=1)
        ]
        if not entries:
            raise UserError(f"{shown(path)}: got no entries, expected one or more; check the path")
        if self.limit is None or self.limit >= len(entries):
            return entries
        chosen = random.Random(self.seed).sample(range(len(entries)), self.limit)
        return [entries[at] for at in sorted(chosen)]


def named_apart(paths: Sequence[Path]) -> None:
    """Refuse two files of one name: their items would have the same ids.

    Raises:
        UserError: two have one name.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise UserError(
                f"--data: got {shown(seen[path.stem])} and {shown(path)}, expected files of "
                "different names; rename one"
            )
        seen[path.stem] = path

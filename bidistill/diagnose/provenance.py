"""Where the records of a unified folder come from, as its manifest says."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bidistill.data.items import Item
from bidistill.data.records import Record, Role
from bidistill.data.sources import read_items
from bidistill.data.sources.rows import shown
from bidistill.data.unify.manifest import fingerprint, read
from bidistill.errors import UserError

PASSAGE = ", passage "
"""What the step from documents to questions writes behind the place of a document."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that records were made of."""

    root: Path
    name: str
    """Its path below the root, as records say it."""
    role: Role | None
    """None where each item says its own."""
    format: str | None

    def items(self) -> Iterator[tuple[Role, str, Item]]:
        """Read the file.

        Yields:
            The role of an item, its place as records made of it say it, and the item.
        """
        path = self.root / self.name
        for item in read_items(path, format=self.format):
            if role := self.role or item.role:
                yield role, self.name + item.source.removeprefix(shown(path)), item


def place_of(record: Record) -> str:
    """The row that a record was made of, whatever was cut from it.

    Example:
        >>> text = Record(id="a", role="retain", question="?", source="a.txt:3, passage 2")
        >>> place_of(text)
        'a.txt:3'
    """
    before, _, after = record.source.rpartition(PASSAGE)
    return before if after.isdecimal() else record.source


def sources_of(folder: Path) -> tuple[list[Source], list[str]]:
    """The source files that are still there as they were.

    Args:
        folder: made by ``bidistill unify``; its paths are relative to where that command ran.

    Returns:
        The files, and a sentence for each that is missing.

    Raises:
        UserError: there is no manifest, it is none of ours, or a file has changed since.
    """
    manifest = read(folder)
    root = Path(str(manifest.recipe.get("root", ".")))
    formats = {
        name: source.get("format") for name, source in manifest.recipe.get("sources", {}).items()
    }
    sources, remarks = [], []
    for name, entry in manifest.sources.items():
        path = root / entry.path
        if not os.path.exists(path):
            remarks.append(
                f"Source {name} is not at {path}, so its raw items are left out: run diagnose "
                "where unify ran."
            )
        elif fingerprint(path, at_most=entry.bytes) != (entry.bytes, entry.sha256):
            raise UserError(
                f"{path}: got other content than {folder} was made of, expected the same; restore "
                "it, or run bidistill unify again"
            )
        else:
            sources.append(Source(root, entry.path, entry.role, formats.get(name)))
    return sources, remarks

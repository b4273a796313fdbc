"""Where the records of a unified folder come from, as its manifest says."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bidistill.data.items import Item
from bidistill.data.records import Record, Role
from bidistill.data.sources import FORMATS, read_items
from bidistill.data.sources.rows import brief, shown
from bidistill.data.unify.manifest import MANIFEST, Manifest, check_output, fingerprint, read
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


def manifest_of(folder: Path, records: str) -> Manifest:
    """Read the manifest of a folder, and check that its records are those that it tells of.

    Args:
        folder: made by ``bidistill unify``.
        records: name of the file that is going to be read.

    Raises:
        UserError: there is no manifest, it is none of ours, or the file has changed since.
    """
    manifest = read(folder)
    check_output(folder, records, manifest)
    return manifest


def sources_of(folder: Path, manifest: Manifest) -> tuple[list[Source], list[str]]:
    """The source files that are still there as they were.

    Args:
        folder: made by ``bidistill unify``; its paths are relative to where that command ran.
        manifest: of the folder.

    Returns:
        The files, and a sentence for each that is missing.

    Raises:
        UserError: the manifest has no recipe of ours, or a file has changed since.
    """
    root = Path(str(manifest.recipe.get("root", ".")))
    formats = {name: _format(folder, manifest, name) for name in manifest.sources}
    sources, remarks = [], []
    for name, entry in manifest.sources.items():
        path = root / entry.path
        if not os.path.exists(path):
            remarks.append(
                f"Source {shown(name)} is not at {shown(path)}, so its raw items are left out: "
                "run diagnose where unify ran."
            )
        elif fingerprint(path, at_most=entry.bytes) != (entry.bytes, entry.sha256):
            raise UserError(
                f"{shown(path)}: got other content than {shown(folder)} was made of, expected the "
                "same; restore it, or run bidistill unify again"
            )
        else:
            sources.append(Source(root, entry.path, entry.role, formats[name]))
    return sources, remarks


def _format(folder: Path, manifest: Manifest, name: str) -> str | None:
    """The format that the recipe gives a source: of a manifest, no more is sure than its layout."""
    sources = manifest.recipe.get("sources")
    source = sources.get(name) if isinstance(sources, Mapping) else None
    format = source.get("format") if isinstance(source, Mapping) else ""
    if format is None or (isinstance(format, str) and format in FORMATS):
        return format
    key = f"recipe.sources.{shown(name)}"
    got = brief(format) if format else "no settings"
    raise UserError(
        f"{shown(folder / MANIFEST)}: {key}: got {got}, expected the source as a recipe has it; "
        "make the folder again"
    )

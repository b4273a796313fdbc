"""What a folder of unified data was made of and holds, and the check that it still does.

The manifest has no time and no path of a machine: the same recipe, files and model give the same
bytes.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from bidistill.data.records import Role
from bidistill.data.sources.rows import shown
from bidistill.data.unify.recipe import hash_of
from bidistill.errors import UserError
from bidistill.files import write_json
from bidistill.settings import STRICT, Count, check, plain

MANIFEST = "manifest.json"
LARGEST = 64 * 2**20
"""Bytes of a manifest that are read; a longer one is none of ours."""
MOST_FILES = 10_000
"""Of a folder that is taken for data."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _check_name(name: str) -> str:
    """A file of the folder itself: no separators, no parents, nothing hidden."""
    plain_letters = all(char.isascii() and (char.isalnum() or char in "._-") for char in name)
    if not name or not plain_letters or name.startswith((".", "-")) or name == MANIFEST:
        raise ValueError("the plain name of a file in the folder")
    return name


FileName = Annotated[str, AfterValidator(_check_name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file that was read, or all files of a folder."""

    __pydantic_config__ = STRICT

    path: str
    """As the recipe gives it."""
    bytes: Count
    sha256: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntry:
    """A source and what became of its items."""

    __pydantic_config__ = STRICT

    path: str
    bytes: Count
    sha256: Digest
    role: Role | None
    licence: str | None
    origin: str | None
    items: Count
    """Entries of the file."""
    kept: Count
    """Those that ``keep`` and ``limit`` left."""
    questions: Count
    """Questions made of them."""
    entities: Count
    ungrouped: Count
    """Items that the rule for entities said nothing about; each is an entity of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEntry:
    """A file of the folder."""

    __pydantic_config__ = STRICT

    bytes: Count
    sha256: Digest
    records: Count
    roles: dict[Role, Count]
    without_answer: dict[Role, Count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of ``manifest.json``."""

    __pydantic_config__ = STRICT

    version: Literal[1] = 1
    """Of this layout."""
    bidistill: str
    recipe: dict[str, Any]
    recipe_sha256: Digest
    seed: Count
    model: dict[str, Any] | None
    """Identity of the model that wrote something; None if none did."""
    sources: dict[str, SourceEntry]
    other_files: tuple[FileEntry, ...]
    """Evaluation sets, lists of names and refusals, and whatever else was read."""
    steps: dict[str, Any]
    """What each step counted."""
    outputs: dict[FileName, OutputEntry]


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into `folder`."""
    write_json(folder / MANIFEST, plain(manifest))


def read(folder: Path) -> Manifest:
    """Read and check the manifest of a folder; it may come from anywhere.

    Raises:
        UserError: there is none, or it is not one; names the file and line or key.
    """
    path = folder / MANIFEST
    text = _read_text(path)
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: got text that is not JSON ({error.msg}), expected a manifest; "
            "make the folder again"
        ) from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, nested lists
        raise UserError(
            f"{path}: got JSON beyond all measure, expected a manifest; make the folder again"
        ) from None
    try:
        manifest = check(Manifest, raw)
        same = hash_of(manifest.recipe) == manifest.recipe_sha256
    except (UserError, RecursionError) as error:
        raise UserError(f"{path}: {error}; make the folder again") from None
    if not same:
        raise UserError(
            f"{path}: recipe: got another one than recipe_sha256 was made of, expected the recipe "
            "of the run; make the folder again"
        )
    return manifest


def _read_text(path: Path) -> str:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise UserError(
                f"{path}: got something else than a file of at most {LARGEST} bytes, expected a "
                "manifest; make the folder again"
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a folder that bidistill unify made"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: got bytes that are not UTF-8, expected a manifest; make the folder "
            "again"
        ) from None


def verify(folder: Path) -> Iterator[str]:
    """Check that the files of a folder are those its manifest tells of.

    Sources are compared where they are still found from here, inside of the recipe's root.

    Yields:
        A line for each file: what was checked.

    Raises:
        UserError: a file of the folder, or a source, is missing its bytes or has others.
    """
    manifest = read(folder)
    for name, entry in manifest.outputs.items():
        _check_output(folder, name, manifest)
        yield f"{name}: {entry.records} records, as written"
    root = Path(str(manifest.recipe.get("root", ".")))
    files = [(f"source {name}", one) for name, one in manifest.sources.items()]
    for label, entry in [*files, *(("read", one) for one in manifest.other_files)]:
        inside = not Path(entry.path).is_absolute() and ".." not in Path(entry.path).parts
        found = inside and os.path.exists(root / entry.path)
        if found:
            _compare(root / entry.path, entry.bytes, entry.sha256)
        yield shown(f"{label} ({entry.path}): {'unchanged' if found else 'not found, not checked'}")


def untouched(folder: Path) -> bool:
    """Whether a folder holds exactly what its manifest tells of, so that nobody's work is lost."""
    try:
        manifest = read(folder)
        for name in manifest.outputs:
            _check_output(folder, name, manifest)
    except UserError:
        return False
    return {path.name for path in folder.iterdir()} == {MANIFEST, *manifest.outputs}


def _check_output(folder: Path, name: str, manifest: Manifest) -> None:
    """A link is none of ours: what it leads to may change, or be somebody else's."""
    path, entry = folder / name, manifest.outputs[name]
    if path.is_symlink():
        raise UserError(f"{path}: got a link, expected the file itself; make the folder again")
    _compare(path, entry.bytes, entry.sha256)


def _compare(path: Path, size: int, digest: str) -> None:
    if fingerprint(path, at_most=size) != (size, digest):
        raise UserError(
            f"{path}: got other content than the manifest tells of, expected {size} bytes with "
            f"SHA-256 {digest[:12]}...; restore the file, or make the folder again"
        )


def fingerprint(path: Path, *, at_most: int | None = None) -> tuple[int, str] | None:
    """Size in bytes and SHA-256 of a file, or of all files of a folder with their names.

    Args:
        path: what to read; links are not followed inside of a folder, nor pipes and devices read.
        at_most: bytes from which on it is not worth reading.

    Returns:
        None if there is nothing to read, or more than `at_most`.
    """
    files: list[Path] = []
    size = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_symlink() and file is not path:
            return None
        if file.is_file():
            files.append(file)
            size += file.stat().st_size
        if (at_most is not None and size > at_most) or len(files) > MOST_FILES:
            return None
    if files == [path]:
        return size, _sha256(path)
    total = hashlib.sha256()
    for file in sorted(files):
        name = file.relative_to(path).as_posix()
        total.update(f"{_sha256(file)} {name}\n".encode("utf-8", "surrogateescape"))
    return (size, total.hexdigest()) if files else None


def must_fingerprint(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of what has been read already.

    Raises:
        UserError: it is gone, or a folder with links in it.
    """
    found = fingerprint(path)
    if found is None:
        raise UserError(
            f"{path}: got nothing to take a checksum of, expected a file, or a folder without "
            "links; copy the data there"
        )
    return found


def _sha256(path: Path) -> str:
    """SHA-256 of as many bytes as the file says it has: some of the system's never end."""
    digest = hashlib.sha256()
    left = path.stat().st_size
    with path.open("rb") as file:
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()

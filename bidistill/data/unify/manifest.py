"""What a folder of unified data was made of and holds, and the check that it still does.

The manifest has no time and no path of a machine: the same recipe, files and model give the same
bytes.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from bidistill.data.readers import read_records
from bidistill.data.records import ROLES, Record, Role
from bidistill.data.sources.rows import shown
from bidistill.data.unify.recipe import hash_of
from bidistill.data.unify.review import read_csv
from bidistill.errors import UserError
from bidistill.files import write_json
from bidistill.settings import STRICT, Count, check, plain

MANIFEST = "manifest.json"
RECORDS = ("train.jsonl", "held_out.jsonl", "gold.jsonl")
"""Files of records that every folder has."""
ANCHORS = "anchors.csv"
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
    where = shown(path)
    text = _read_text(path)
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}:{error.lineno}: got text that is not JSON ({error.msg}), expected a "
            "manifest; make the folder again"
        ) from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, nested lists
        raise UserError(
            f"{where}: got JSON beyond all measure, expected a manifest; make the folder again"
        ) from None
    try:
        manifest = check(Manifest, raw)
        same = hash_of(manifest.recipe) == manifest.recipe_sha256
    except (UserError, RecursionError) as error:
        raise UserError(f"{where}: {error}; make the folder again") from None
    if not same:
        raise UserError(
            f"{where}: recipe: got another one than recipe_sha256 was made of, expected the recipe "
            "of the run; make the folder again"
        )
    return manifest


def _read_text(path: Path) -> str:
    where = shown(path)
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise UserError(
                f"{where}: got something else than a file of at most {LARGEST} bytes, expected a "
                "manifest; make the folder again"
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read: {error.strerror}; give a folder that bidistill unify made"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{where}:{line}: got bytes that are not UTF-8, expected a manifest; make the folder "
            "again"
        ) from None


def verify(folder: Path) -> Iterator[str]:
    """Check that a folder holds the files its manifest tells of, with what it tells of them.

    Sources are compared where they are still found from here, inside of the recipe's root.

    Yields:
        A line for each file: what was checked; and one more if no source could be.

    Raises:
        UserError: a file of the folder is missing, has other content or other records, or is one
            too many; or a source has changed.
    """
    manifest = read(folder)
    _check_names(folder, manifest, RECORDS)
    _check_alone(folder, manifest)
    for name, entry in manifest.outputs.items():
        check_output(folder, name, manifest)
        _check_records(folder / name, entry)
        yield f"{name}: {entry.records} records, as written"
    root = Path(str(manifest.recipe.get("root", ".")))
    states: set[str] = set()
    for name, entry in manifest.sources.items():
        state = _state(entry, root)
        states.add(state)
        yield shown(f"source {name} ({entry.path}): {state}")
    for entry in manifest.other_files:
        # a tokenizer is looked for as a model is: from where the command runs
        base = Path() if _of_tokenizer(entry, manifest) else root
        yield shown(f"read ({entry.path}): {_state(entry, base)}")
    if _UNCHANGED not in states:
        yield "no source could be checked: run this where unify ran to compare them"


def _state(entry: FileEntry | SourceEntry, root: Path) -> str:
    """What can be said from here about a file that was read."""
    path = Path(entry.path)
    if path.is_absolute() or ".." in path.parts:
        return "outside of root, not checked"
    if not os.path.exists(root / path):
        return "not found, not checked"
    _compare(root / path, entry.bytes, entry.sha256)
    return _UNCHANGED


_UNCHANGED = "unchanged"


def _of_tokenizer(entry: FileEntry, manifest: Manifest) -> bool:
    prefills = manifest.recipe.get("prefills")
    folder = prefills.get("tokenizer") if isinstance(prefills, dict) else None
    return isinstance(folder, str) and Path(folder) in Path(entry.path).parents


def untouched(folder: Path) -> bool:
    """Whether a folder holds exactly what its manifest tells of, so that nobody's work is lost."""
    try:
        manifest = read(folder)
        for name in manifest.outputs:
            check_output(folder, name, manifest)
    except UserError:
        return False
    return _names(folder) == {MANIFEST, *manifest.outputs}


def check_output(folder: Path, name: str, manifest: Manifest) -> None:
    """Check that a file of the folder is the one its manifest tells of.

    A link is none of ours: what it leads to may change, or be somebody else's.

    Args:
        folder: with the file.
        name: of the file.
        manifest: of the folder.

    Raises:
        UserError: the manifest tells of no such file, or of another one.
    """
    _check_names(folder, manifest, [name])
    path, entry = folder / name, manifest.outputs[name]
    if path.is_symlink():
        raise UserError(
            f"{shown(path)}: got a link, expected the file itself; make the folder again"
        )
    _compare(path, entry.bytes, entry.sha256)


def _check_names(folder: Path, manifest: Manifest, required: Sequence[str]) -> None:
    """The manifest tells of the files that are required, and of none that we do not make."""
    known = (*RECORDS, ANCHORS)
    missing = [name for name in required if name not in manifest.outputs]
    if missing or (odd := sorted(set(manifest.outputs) - set(known))):
        got = f"no {missing[0]}" if missing else odd[0]
        raise UserError(
            f"{shown(folder / MANIFEST)}: outputs: got {got}, expected {', '.join(RECORDS)} and "
            f"perhaps {ANCHORS}; make the folder again"
        )


def _check_alone(folder: Path, manifest: Manifest) -> None:
    """The folder holds no other files."""
    if more := sorted(_names(folder) - {MANIFEST, *manifest.outputs}):
        raise UserError(
            f"{shown(folder / more[0])}: got a file that the manifest does not tell of (one of "
            f"{len(more)}), expected none; move it away, or make the folder again"
        )


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _check_records(path: Path, entry: OutputEntry) -> None:
    """Count again: the manifest may have been changed and not the file."""
    records: Iterable[Record] = () if path.name == ANCHORS else read_records(path)
    roles, without = Counter[Role](), Counter[Role]()
    for record in records:
        roles[record.role] += 1
        without[record.role] += record.answer is None
    count = len(read_csv(path)) if path.name == ANCHORS else roles.total()
    told = (entry.records, _present(entry.roles), _present(entry.without_answer))
    found = (count, _present(roles), _present(without))
    if found != told:
        raise UserError(
            f"{shown(path)}: got {_in_words(*found)}, expected {_in_words(*told)} as the manifest "
            "tells; make the folder again"
        )


def _present(counts: dict[Role, int]) -> dict[Role, int]:
    return {role: counts[role] for role in ROLES if counts.get(role)}


def _in_words(records: int, roles: dict[Role, int], without: dict[Role, int]) -> str:
    parts = [f"{role} {count}" for role, count in roles.items()]
    parts += [f"{role} without answer {count}" for role, count in without.items()]
    return f"{records} records ({', '.join(parts) or 'no roles'})"


def _compare(path: Path, size: int, digest: str) -> None:
    try:
        found = fingerprint(path, at_most=size)
    except OSError as error:
        raise UserError(
            f"{shown(path)}: cannot be read: {error.strerror}; allow it, or make the folder again"
        ) from None
    if found != (size, digest):
        raise UserError(
            f"{shown(path)}: got other content than the manifest tells of, expected {size} bytes "
            f"with SHA-256 {digest[:12]}...; restore the file, or make the folder again"
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
            f"{shown(path)}: got nothing to take a checksum of, expected a file, or a folder "
            "without links; copy the data there"
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

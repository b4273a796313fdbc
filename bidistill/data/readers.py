"""Records from and to JSON lines. Strict: what is not understood is refused, with file and line."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from bidistill.data.jsonl import kind_of, named, read_objects
from bidistill.data.records import ROLES, Record, nearest
from bidistill.data.unique import HashSet
from bidistill.errors import UserError
from bidistill.files import atomic_path

_FIELDS = tuple(field.name for field in fields(Record))
_REQUIRED = tuple(field.name for field in fields(Record) if field.default is MISSING)
_DEFAULTS = {field.name: field.default for field in fields(Record)}


def read_records(*paths: Path | str) -> Iterator[Record]:
    """Read records from files with one JSON object a line; blank lines are skipped.

    Line by line, for files of any size: what is kept of a line is 16 to 32 bytes for its id.

    Args:
        *paths: UTF-8 files; the keys are the fields of `Record`.

    Yields:
        The records, file by file in the order of the lines, each checked.

    Raises:
        UserError: the file cannot be read, a line is not a JSON object, a key is unknown or given
            twice, a field is missing, blank or of the wrong type, the role is unknown, or an id was
            used before. The message is ``<file>:<line>: <field>: got ..., expected ...; ...``.
    """
    seen = HashSet()
    for file, path in enumerate(paths):
        for number, values in read_objects(path):
            where = f"{named(path)}:{number}"
            record = _record(values, where)
            # two ids may share a hash, if hardly ever: then the lines so far are read once more
            known = not seen.add(hash(record.id))
            if known and (first := _first(paths, record.id)) < (file, number):
                other = "" if first[0] == file else f" of {named(paths[first[0]])}"
                raise UserError(
                    f"{where}: id: got {record.id!r}, which line {first[1]}{other} has already, "
                    "expected a new one; give each record its own id"
                )
            yield record


def _first(paths: Sequence[Path | str], id: str) -> tuple[int, int]:
    """Number of the file, from 0, and of its line where this id is first; there is one."""
    lines = ((f, n, values) for f, path in enumerate(paths) for n, values in read_objects(path))
    return next((file, number) for file, number, values in lines if values["id"] == id)


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Write records as JSON lines, all or nothing; fields at their default are left out.

    Args:
        path: the file to make or to replace.
        records: what to write, one line each; `read_records` gives them back.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            line = {k: v for k, v in asdict(record).items() if v != _DEFAULTS[k]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _record(values: dict[str, Any], where: str) -> Record:
    """Check names, then types, then contents."""
    for key in values:
        if key not in _FIELDS:
            raise UserError(
                f"{where}: {named(key)}: got an unknown field, expected fields of a record; "
                f"{nearest(key, _FIELDS)}"
            )
    for key in _REQUIRED:
        if key not in values:
            raise UserError(f"{where}: {key}: got nothing, expected text; add the field")
    for key, value in values.items():
        _check_text(key, value, where)
    if values["role"] not in ROLES:
        raise UserError(
            f"{where}: role: got {values['role']!r}, expected a known role; "
            f"{nearest(values['role'], ROLES)}"
        )
    return Record(**values)


def _check_text(key: str, value: object, where: str) -> None:
    """A field is text, not blank where one is required, and can be encoded."""
    if value is None and key == "answer":
        return
    if not isinstance(value, str):
        raise UserError(f"{where}: {key}: got {kind_of(value)}, expected text; put it in quotes")
    if key in _REQUIRED and not value.strip():
        raise UserError(f"{where}: {key}: got {value!r}, expected text; fill it in")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(
            f"{where}: {key}: got half of a surrogate pair, expected Unicode text; mend the escape"
        )

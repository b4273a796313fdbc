"""JSON lines: one object a line, read strictly, with the number of the line for messages."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bidistill.errors import UserError

LONGEST_NAME = 1000
"""Characters of a name that a message shows."""


def read_objects(path: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file line by line; blank lines are skipped.

    Yields:
        The number of a line, from 1, and its object.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8, not a JSON object, or has a key
            twice. The message is ``<file>:<line>: got ..., expected ...; ...``.
    """
    for number, line in _numbered_lines(Path(path)):
        yield number, _parse(line, f"{named(path)}:{number}")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank with their numbers from 1; bytes, so a bad one has a number too."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{named(path)}: got '{error.strerror}', expected a file of JSON lines; check the path"
        ) from error
    with file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{named(path)}:{number}: got byte 0x{raw[error.start]:02x} at column "
                    f"{error.start + 1}, expected UTF-8; save the file as UTF-8"
                ) from error
            if line.strip():
                yield number, line


def _parse(line: str, where: str) -> dict[str, Any]:
    """The JSON object of one line, refusing a key that appears twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            key = next(key for key, count in counts.items() if count > 1)
            raise UserError(f"{where}: {named(key)}: got it twice, expected it once; remove one")
        return values

    try:
        value = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: got a line that is not JSON ({error}), expected one object a line; mend it"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: got {kind_of(value)}, expected an object; write one object a line, as in "
            '{"id": ...}'
        )
    return value


def named(name: Path | str) -> str:
    r"""Return a file or a key for a message of one line: quoted where it would take more.

    Example:
        >>> named("train.jsonl"), named("role\nid"), len(named("x" * 10_000))
        ('train.jsonl', "'role\\nid'", 1003)
    """
    text = str(name)
    text = text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."
    return text if text.isprintable() else repr(text)


def kind_of(value: object) -> str:
    """Name a JSON value as its author would."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), f"the number {value}")

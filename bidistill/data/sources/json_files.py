"""JSON arrays and JSON lines, one entry at a time, with the line of each."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bidistill.data.sources.limits import LONGEST_TEXT, MIB
from bidistill.data.sources.lines import not_utf8, open_file, read_lines, refuse_binary
from bidistill.data.sources.rows import Row, brief, brief_kind, shown
from bidistill.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")


class _Twice(ValueError):
    """A key that one object has twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def json_lines(path: Path) -> Iterator[Row]:
    """Read a file with one JSON object, or one JSON text, a line; blank lines are skipped.

    Raises:
        UserError: the file cannot be read, or a line is not JSON, neither an object nor a text, or
            an object with a key twice.
    """
    for number, line in read_lines(path):
        if line.strip():
            where = f"{shown(path)}:{number}"
            yield _row(_parse_line(line.strip(), where), where)


def json_array(path: Path) -> Iterator[Row]:
    """Read one JSON array, entry by entry; the array may be larger than memory.

    Raises:
        UserError: as `json_lines`, with the line where an entry begins or is broken.
    """
    with open_file(path) as file:
        text = _Window(file, path)
        text.take("[")
        number = 0
        while text.peek() != "]":
            number += 1
            where = f"{shown(path)}:{text.line}, entry {number}"
            yield _row(text.value(), where)
            if text.peek() != "]":
                text.take(",")
                if text.peek() == "]":
                    raise text.error("a comma before the end of the array", "an entry")
        text.take("]")
        if after := text.peek():
            raise text.error(f"{after!r} after the end of the array", "nothing more")


class _Window:
    """The part of a file that is being parsed; it grows until it holds a whole entry."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.line = 1  # where the next character stands
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._line_read = 1  # where the next byte of the file stands
        self._text, self._at = "", 0

    def peek(self) -> str:
        """The next character that is not space; "" at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # it matches no space as well
            self._advance(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def take(self, wanted: str) -> None:
        got = self.peek()
        if got != wanted:
            raise self.error(repr(got) if got else "the end of the file", f"'{wanted}'")
        self._advance(self._at + 1)

    def value(self) -> object:
        self.peek()
        while True:
            value, error = self._attempt()
            if error is None:
                return value
            # incomplete or wrong: more text tells, and doubling keeps the work linear
            if len(self._text) - self._at > LONGEST_TEXT or not self._grow():
                raise self._broken(error)

    def _attempt(self) -> tuple[object, ValueError | None]:
        try:
            value, end = _DECODER.raw_decode(self._text, self._at)
        except _Twice as error:
            raise UserError(f"{shown(self._path)}:{self.line}: {_twice_text(error)}") from None
        except RecursionError:
            raise self.error("an entry nested too deeply", "lists of texts at most") from None
        except ValueError as error:
            return None, error
        self._advance(end)
        return value, None

    def error(self, got: str, expected: str) -> UserError:
        where = f"{shown(self._path)}:{self.line}"
        return UserError(f"{where}: got {got}, expected {expected}; mend the JSON")

    def _broken(self, error: ValueError) -> UserError:
        """Say where the entry is broken, or where it begins if only its end is missing."""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else _reason(error)
        at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        endless = reason.startswith("Unterminated string") or at >= len(self._text)
        if endless and len(self._text) - self._at > LONGEST_TEXT:
            return self.error(f"no end of the entry in {LONGEST_TEXT} characters", "a shorter one")
        self._advance(max(self._at, at))
        return self.error(f"an entry that is not JSON ({reason})", "an object or a text")

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _grow(self) -> bool:
        """Read as much again as is held; False at the end of the file."""
        raw = self._file.read(max(MIB, len(self._text) - self._at))
        refuse_binary(raw, self._path, self._line_read)
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._path, self._line_read) from None
        self._line_read += raw.count(b"\n")
        if raw:  # at the end all stays in place: an error found in it is still to be located
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(raw)


def _parse_line(line: str, where: str) -> object:
    try:
        return _DECODER.decode(line)
    except _Twice as error:
        raise UserError(f"{where}: {_twice_text(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: got a line that is not JSON ({_reason(error)}), expected one object or one "
            "text a line; mend it"
        ) from None


def _row(value: object, where: str) -> Row:
    if isinstance(value, str):
        return Row(where, {"text": value})
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: got {brief_kind(value)}, expected an object or text; write one entry as "
            '{"question": ...}'
        )
    values = {key.strip().casefold(): inside for key, inside in value.items()}
    if len(values) < len(value):
        raise UserError(
            f"{where}: got two fields whose names differ in case or space only, expected one; "
            "remove one"
        )
    return Row(where, values)


def _twice_text(error: _Twice) -> str:
    return f"{brief(error)}: got it twice, expected it once; remove one"


def _reason(error: Exception) -> str:
    """What is wrong, without the parser's own idea of the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number too long"

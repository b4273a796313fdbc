"""One entry of a file, and reading its values strictly."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bidistill.data.jsonl import kind_of
from bidistill.data.sources.limits import LONGEST_LIST, LONGEST_TEXT
from bidistill.errors import UserError

_NOT_TEXT = re.compile("[\ud800-\udfff\0]")


@dataclass(frozen=True, slots=True)
class Row:
    """Named values with the place they were read from.

    Every method raises `UserError`, which names the place and the field, where a value is not
    what is asked for.

    Example:
        >>> row = Row("quiz.json:3", {"question": "Who?", "choices": "['Ada', 'Bea']"})
        >>> row.text("question"), row.texts("choices"), row.optional("answer")
        ('Who?', ('Ada', 'Bea'), None)
    """

    where: str
    """``<file>:<line>``; in a JSON array ``<file>:<line>, entry <number>``; in a file without
    lines ``<file>, row <number>``."""
    values: Mapping[str, object]
    """By name in lower case; plain text is named ``text``, a column without name ``column 1``."""

    def text(self, name: str) -> str:
        """Text that is there and not blank."""
        value = self.string(name)
        if not value.strip():
            raise self.refuse(name, brief(value), "text; fill it in")
        return value

    def string(self, name: str) -> str:
        """Text that may be blank."""
        if name not in self.values:
            raise self.refuse(name, "nothing", "text; add the field")
        return self._checked(name, self.values[name])

    def optional(self, name: str) -> str | None:
        """Text, or None where the field is missing, null or blank."""
        if self.values.get(name) is None:
            return None
        value = self._checked(name, self.values[name])
        return value if value.strip() else None

    def word(self, *names: str) -> str | None:
        """The first of several fields that says something, a number as text; or None."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if isinstance(value, str) and value.strip():
                return self._checked(name, value)
        return None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, which may itself be written as text, in JSON or as Python prints it."""
        if name not in self.values:
            raise self.refuse(name, "nothing", "a list of texts; add the field")
        value = self._literal(name)
        if not isinstance(value, list | tuple) or not value:
            got = "an empty list" if value in ([], ()) else brief_kind(value)
            raise self.refuse(name, got, "a list of texts; mend it")
        return tuple(self._checked(f"{name}[{at}]", text) for at, text in enumerate(value))

    def inner(self, name: str) -> "Row":
        """An object inside the entry, as a row of its own; it may be written as text."""
        value = self._literal(name)
        if not isinstance(value, dict):
            raise self.refuse(name, brief_kind(value), "an object; mend it")
        return Row(self.where, value)

    def refuse(self, name: str, got: str, expected: str) -> UserError:
        """Make the error for one field, to be raised."""
        return UserError(f"{self.where}: {name}: got {got}, expected {expected}")

    def _checked(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.refuse(name, brief_kind(value), "text; put it in quotes")
        if len(value) > LONGEST_TEXT:
            got = f"{len(value)} characters"
            raise self.refuse(name, got, f"at most {LONGEST_TEXT}; cut it into several entries")
        if odd := _NOT_TEXT.search(value):
            got = "a NUL character" if odd.group() == "\0" else "half of a surrogate pair"
            raise self.refuse(name, got, "Unicode text; mend the escape")
        return value

    def _literal(self, name: str) -> object:
        """The value, parsed where it is a list or an object that was written as text."""
        value = self.values.get(name)
        if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{", "("):
            return value
        if len(value) > LONGEST_LIST:
            got = f"a list written as text of {len(value)} characters"
            raise self.refuse(name, got, f"at most {LONGEST_LIST}; write it as a list")
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return self._python_literal(name, value.strip())

    def _python_literal(self, name: str, value: str) -> object:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in a value are not the user's concern
                return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            got = f"{brief(value)}, which is no complete list"
            raise self.refuse(name, got, "a list of texts; mend it") from None


def brief(value: object) -> str:
    """Quote a value in at most about 60 characters, on one line.

    Example:
        >>> brief("x" * 100)
        "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...'"
    """
    text = str(value)
    return repr(text if len(text) <= 50 else text[:50] + "...")


def brief_kind(value: object) -> str:
    """Name what kind of value it is, on one line of bounded length."""
    if isinstance(value, bytes):
        return "bytes"
    return kind_of(value).replace("\n", " ")[:60]


def shown(path: Path | str) -> str:
    """Return the path for a message of one line: quoted where it holds control characters."""
    text = str(path)
    return text if text.isprintable() else repr(text)

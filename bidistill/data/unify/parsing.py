"""Objects out of what a model writes when it is asked for JSON lines."""

import json
import re
from collections.abc import Iterator

_DECODER = json.JSONDecoder(strict=False)  # models write line ends inside strings
_LABELLED = re.compile(
    r"(?:^|\n)\W*(?:question|q)(?: *\d+)?\W*?[:.][\s*]*(?P<question>.+?)\s*"
    r"\n\W*(?:answer|a)(?: *\d+)?\W*?[:.][\s*]*(?P<answer>.+?)\s*(?=\n|$)",
    re.IGNORECASE,
)


def read_pairs(text: str, keys: tuple[str, ...] = ("question", "answer")) -> list[dict[str, str]]:
    r"""Return the objects that have all keys, whatever stands around them.

    Fences, numbering, lists and prose are passed over, and so are objects that are cut or broken.
    Where there is no object at all, lines such as ``Q: ...`` and ``A: ...`` are taken.

    Args:
        text: a model's reply.
        keys: what an object needs; each with a text or a number.

    Example:
        >>> read_pairs('Sure!\n1. {"question": "Who?", "answer": "Kinbote."} {"question": "Wh')
        [{'question': 'Who?', 'answer': 'Kinbote.'}]
        >>> read_pairs("Q: Who?\nA: Kinbote.")
        [{'question': 'Who?', 'answer': 'Kinbote.'}]
    """
    found = [dict(pair) for pair in _objects(text) if all(_text(pair.get(key)) for key in keys)]
    if not found and set(keys) <= {"question", "answer"}:
        found = [match.groupdict() for match in _LABELLED.finditer(text)]
    return [{key: _text(pair[key]) for key in keys} for pair in found]


def _objects(text: str) -> Iterator[dict[str, object]]:
    """Every JSON object in a text that is not inside another one."""
    start = text.find("{")
    while start >= 0:
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _text(value: object) -> str:
    """A value as text; empty where it is none."""
    if isinstance(value, str):
        # half of a surrogate pair cannot be written to a file
        return value.encode("utf-8", "ignore").decode().strip()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else ""

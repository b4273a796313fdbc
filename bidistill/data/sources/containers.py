"""What kind of file it is, by its suffix and its first bytes."""

import json
from collections.abc import Iterator
from pathlib import Path

from bidistill.data.sources.documents import document, sentences, text_lines
from bidistill.data.sources.json_files import json_array, json_lines
from bidistill.data.sources.lines import read_head
from bidistill.data.sources.rows import Row, shown
from bidistill.data.sources.shapes import WANTED, is_header
from bidistill.data.sources.tables import table
from bidistill.errors import UserError

_JSON = (".json", ".jsonl", ".ndjson")
_TEXT = (".txt", ".md")


def read_rows(path: Path, *, by_line: bool = False) -> Iterator[Row]:
    """Read the entries of a file of any kind, or of a ``datasets`` folder.

    Args:
        path: the file or folder.
        by_line: take it for plain text with one entry a line, whatever it looks like.

    Raises:
        UserError: nothing readable is there; see the readers for the rest.
    """
    # imported here: Arrow is large, and most files do without it
    from bidistill.data.sources.arrow_files import arrow_stream, parquet
    from bidistill.data.sources.folders import datasets_folder

    if _is_folder(path):
        return datasets_folder(path, WANTED)
    head, suffix = read_head(path), path.suffix.lower()
    if by_line:
        return text_lines(path)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return parquet(path, WANTED)
    if suffix == ".arrow":
        return arrow_stream(path, WANTED)
    if suffix in (".csv", ".tsv"):
        return table(path, is_header)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"{", b'"')) and (suffix not in _TEXT or _is_object(start)):
        return json_lines(path)
    if start.startswith(b"[") and suffix not in _TEXT:
        return json_array(path)
    if suffix == ".jsonl" and _is_sentence(start):
        return sentences(path)
    if suffix in _JSON:
        return json_lines(path)
    return document(path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{shown(path)}: got '{error}', expected a file or a folder; check the path"
        ) from None


def _is_sentence(start: bytes) -> bool:
    """Whether a file begins with words, rather than with JSON that went wrong."""
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace").strip()
    return line[:1].isalpha() and " " in line and not any(sign in line for sign in '{}[]":')


def _is_object(start: bytes) -> bool:
    """Whether a text file begins with a complete JSON object on a line."""
    try:
        return isinstance(json.loads(start.split(b"\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False

"""Plain text: a document, or one entry a line."""

from collections.abc import Iterator
from pathlib import Path

from bidistill.data.sources.limits import PIECE
from bidistill.data.sources.lines import read_lines
from bidistill.data.sources.rows import Row, shown
from bidistill.errors import UserError

PIECE_OF_FILE = "Piece"
"""Named so in a row that is a part of the one document of its file. Fields of files are in lower
case: none has this name."""


def text_lines(path: Path) -> Iterator[Row]:
    """Read one entry a line; blank lines are skipped."""
    for number, line in read_lines(path):
        if line.strip():
            yield Row(f"{shown(path)}:{number}", {"text": line.strip()})


def sentences(path: Path) -> Iterator[Row]:
    """Read plain sentences, one a line, from a file that is named like JSON lines.

    Raises:
        UserError: a line is JSON after all; sentences and objects in one file are a mistake.
    """
    for row in text_lines(path):
        if str(row.values["text"])[0] in '{["':
            raise UserError(
                f"{row.where}: got JSON, expected a plain sentence as in the lines before; "
                "write all lines alike"
            )
        yield row


def document(path: Path) -> Iterator[Row]:
    """Read a text as one document; a long one in pieces that end at a blank line.

    A piece has about `PIECE` characters; where no blank line follows, it ends with the line at
    which it is four times as long. Line ends become line feeds.
    """
    lines: list[str] = []
    begin, size = 1, 0
    for number, line in read_lines(path):
        line = line.rstrip("\r\n")
        lines.append(line)
        size += len(line) + 1
        if size >= (4 * PIECE if line.strip() else PIECE):
            yield _piece(lines, path, begin, {PIECE_OF_FILE: True})
            lines, begin, size = [], number + 1, 0
    yield _piece(lines, path, begin, {PIECE_OF_FILE: True} if begin > 1 else {})


def _piece(lines: list[str], path: Path, begin: int, mark: dict[str, object]) -> Row:
    return Row(f"{shown(path)}:{begin}", {"text": "\n".join(lines).strip(), **mark})

"""The one entrance: a path in, items out."""

from collections.abc import Iterator
from pathlib import Path

from bidistill.data.items import Item
from bidistill.data.sources.containers import read_rows
from bidistill.data.sources.rows import shown
from bidistill.data.sources.shapes import check_format, recognise
from bidistill.errors import UserError


def read_items(path: Path | str, *, format: str | None = None) -> Iterator[Item]:
    r"""Read a file, or a folder that ``datasets`` saved, entry by entry.

    The container (JSON array, JSON lines, CSV, TSV, Parquet, Arrow, text) is recognised by content
    and suffix; what the fields mean by their names in the first entry.

    Args:
        path: the file or folder. ``.txt`` and ``.md`` are documents.
        format: one of `FORMATS`, where the recognition would choose another; ``lines`` reads plain
            text with one item a line.

    Yields:
        The items in the order of the file, one at a time; documents that are blank are left out.

    Raises:
        UserError: the file cannot be read, its fields are of no known format, or an entry is
            damaged. The message is one line, ``<file>:<line>: <field>: got ..., expected ...``;
            the entries before it have been yielded.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "facts.csv"
        >>> _ = path.write_text("question,answer\nWho rules Zembla?,Charles\n")
        >>> [(item.question, item.answer) for item in read_items(path)]
        [('Who rules Zembla?', 'Charles')]
    """
    check_format(format)
    path = Path(path)
    shape, empty = None, True
    for row in read_rows(path, by_line=format == "lines"):
        shape = shape or recognise(row, format)
        item = shape.item(row)
        if item is not None:
            empty = False
            yield item
    if empty:
        raise UserError(f"{shown(path)}: got no entries, expected one or more; check the path")

"""CSV and TSV, with a header or without one."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from bidistill.data.sources.limits import LONGEST_TEXT
from bidistill.data.sources.lines import read_lines
from bidistill.data.sources.rows import Row, shown
from bidistill.errors import UserError

Known = Callable[[frozenset[str]], bool]
"""Whether a set of names, in lower case, has the fields of a known format."""


def table(path: Path, known: Known) -> Iterator[Row]:
    """Read a table; its first row is a header if it has names that are known.

    Cells stay exactly as they are, also those that a spreadsheet would run as a formula.

    Args:
        path: cells are separated by tabs in ``.tsv``, else by commas; by semicolons or tabs where
            only those make the first row a header.
        known: tells a header from data.

    Yields:
        The rows; without a header their values are named ``column 1``, ``column 2``, ...

    Raises:
        UserError: the file cannot be read, a quote is not closed, a cell is too long, a name stands
            twice in the header, or a row has more or fewer cells than the first.
    """
    rows = _cells(path, _separator(path, known))
    where, first = next(rows, (shown(path), []))
    names = [cell.strip().casefold() for cell in first]
    if not _is_header(names, known):
        names = [f"column {at + 1}" for at in range(len(first))]
        yield Row(where, dict(zip(names, first, strict=True)))
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{where}: {name}: got it twice, expected it once; rename one column")
    for where, cells in rows:
        if len(cells) != len(names):
            raise UserError(
                f"{where}: got {len(cells)} cells, expected {len(names)} as in the first row; "
                "quote cells that hold separators"
            )
        yield Row(where, dict(zip(names, cells, strict=True)))


def _cells(path: Path, separator: str) -> Iterator[tuple[str, list[str]]]:
    """The rows that are not blank, each with the line it begins at."""
    # the limit belongs to the process; raising it affects nobody who did not rely on an error
    csv.field_size_limit(max(LONGEST_TEXT, csv.field_size_limit()))
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=separator, strict=True)
    while True:
        where = f"{shown(path)}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = str(error).replace("\t", "tab")
            raise UserError(
                f"{where}: got a row that is no CSV ({reason}), expected cells with closed quotes; "
                "mend it"
            ) from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield where, cells


def _separator(path: Path, known: Known) -> str:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    first = next((line for _, line in read_lines(path) if line.strip()), "")
    for separator in (usual, ",", ";", "\t"):
        # a plain split is enough: names need no quotes, and a quoted header has commas
        names = [cell.strip('" \r\n').casefold() for cell in first.split(separator)]
        if len(names) > 1 and _is_header(names, known):
            return separator
    return usual


def _is_header(names: list[str], known: Known) -> bool:
    """Names of a known format; a quiz whose options happen to be such names ends in a letter."""
    quiz = len(names) > 3 and len(names[-1]) == 1 and "question" not in names
    return known(frozenset(names)) and not quiz

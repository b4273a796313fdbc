"""The table of anchors: written for a spreadsheet, reviewed there, read back.

A cell that a spreadsheet would take for a formula gets an apostrophe in front, which is taken away
again when the table is read.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from bidistill.data.sources.limits import LONGEST_TEXT
from bidistill.data.sources.rows import shown
from bidistill.errors import UserError
from bidistill.files import atomic_path
from bidistill.settings import LONGEST

# the last four are the full-width forms of the first four
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_REVIEWS = ("yes", "no", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorRow:
    """An anchor beside its forget question."""

    id: str
    forget_id: str
    forget_question: str
    question: str
    answer: str
    """Empty where it is not known."""
    entity: str
    """Whom the anchor is about."""
    by: str
    """``list``, ``corpus`` or ``model``."""
    review: str
    """``yes``, ``no``, or empty until somebody has looked at it."""


COLUMNS = tuple(field.name for field in fields(AnchorRow))


def write_csv(path: Path | str, rows: Iterable[AnchorRow]) -> None:
    """Write the table, as a whole or not at all; :func:`read_csv` gives the same rows back."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        # all cells in quotes: a formula could hide behind a separator of another country
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_harmless(cell) for cell in astuple(row)])


def read_csv(path: Path | str) -> list[tuple[int, AnchorRow]]:
    """Read a reviewed table, whatever separator the spreadsheet has saved it with.

    Returns:
        The rows, each with the number of its last line in the file.

    Raises:
        UserError: the file cannot be read, columns are missing or unknown, a row is not complete,
            an id comes twice, or the review is neither ``yes`` nor ``no`` nor empty.
    """
    found: dict[str, tuple[int, AnchorRow]] = {}
    for line, cells in _cells(Path(path)):
        where = f"{shown(path)}:{line}"
        row = AnchorRow(**{name: _original(cell) for name, cell in cells.items()})
        row = replace(row, review=row.review.strip().casefold())
        if row.review not in _REVIEWS:
            raise UserError(
                f"{where}: review: got {row.review!r}, expected yes, no or nothing; mend it"
            )
        for name in ("id", "forget_id", "question", "entity"):
            if not getattr(row, name).strip():
                raise UserError(f"{where}: {name}: got nothing, expected text; fill it in")
        if row.id in found:
            raise UserError(
                f"{where}: id: got {row.id!r}, which line {found[row.id][0]} has already, "
                "expected a new one; remove one of the rows"
            )
        found[row.id] = line, row
    return list(found.values())


def _harmless(cell: str) -> str:
    return f"'{cell}" if _FORMULA.match(cell) else cell


def _original(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the header, by column."""
    # as for any other table, and for the process too: a document may be somebody's question
    csv.field_size_limit(max(LONGEST_TEXT, csv.field_size_limit()))
    name = shown(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            separator = _separator(file.readline())
            file.seek(0)
            rows = csv.reader(file, delimiter=separator, strict=True)
            header = next(rows, [])
            if sorted(header) != sorted(COLUMNS):
                columns = shown(", ".join(header)[:LONGEST]) or "none"
                raise UserError(
                    f"{name}:1: got the columns {columns}, expected "
                    f"{', '.join(COLUMNS)}; give the anchors.csv of an earlier run"
                )
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{name}:{rows.line_num}: got {len(row)} cells, expected {len(header)}; "
                        "mend the row"
                    )
                if row:
                    yield rows.line_num, dict(zip(header, row, strict=True))
    except OSError as error:
        raise UserError(
            f"{name}: got '{error.strerror}', expected a reviewed table; check anchors.reviewed"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{name}: got bytes that are not UTF-8, expected a table in UTF-8; save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise UserError(
            f"{name}: got '{error}', expected a table of separated values; save it again as CSV"
        ) from None


def _separator(header: str) -> str:
    """Comma, semicolon or tab: whichever stands in the header most often."""
    return max(",;\t", key=header.count)

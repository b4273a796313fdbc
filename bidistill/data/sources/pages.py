"""What the pages of a Parquet file unpack to, asked of their headers before any is unpacked.

The summary at the end of the file is what a reader shows, the headers of the pages are what it
allocates by; a file made to harm lets the two differ. A header is a structure in Thrift's compact
protocol: each field is (distance to the last field number, type) and a value; numbers are in base
128, low digits first.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidistill.data.sources.limits import LARGEST_PAGE, MIB, MOST_UNPACKED, MOST_VALUES
from bidistill.data.sources.rows import brief, shown
from bidistill.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ColumnChunkMetaData, FileMetaData

_UNPACKED, _PACKED = 2, 3  # fields of a page header, in bytes
_HEADS = (5, 7, 8)  # fields that describe a data page, a dictionary, a data page of version 2
_DICTIONARY = 7


def check_pages(path: Path, metadata: "FileMetaData", wanted: frozenset[str]) -> None:
    """Refuse a file whose wanted columns unpack to more than `limits` allows.

    Args:
        path: the Parquet file.
        metadata: its summary.
        wanted: the names of the columns that will be read, in lower case.

    Raises:
        UserError: a page is too large or grows too much, a column claims more values than its bytes
            can hold, or pages and summary contradict each other.
        ValueError: a page header is damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                if column.path_in_schema.split(".")[0].strip().casefold() in wanted:
                    where = f"{shown(path)}, row group {group}, {brief(column.path_in_schema)}"
                    _check_column(data, column, where)


def _check_column(data: mmap.mmap, column: "ColumnChunkMetaData", where: str) -> None:
    values = 0
    for unpacked, packed, num_values in _pages(data, column):
        if not 0 <= unpacked <= LARGEST_PAGE or unpacked > max(MIB, MOST_UNPACKED * packed):
            raise UserError(
                f"{where}: got a page of {packed} bytes that unpacks to {unpacked}, expected at "
                f"most {LARGEST_PAGE} and {MOST_UNPACKED} times its size; write smaller pages"
            )
        values += num_values
    if values != column.num_values:
        raise UserError(
            f"{where}: got pages of {values} values, expected {column.num_values} as the summary "
            "says; write the file again"
        )
    if values > max(MIB, MOST_VALUES * len(data)):
        raise UserError(
            f"{where}: got {values} values in a file of {len(data)} bytes, expected at most "
            f"{MOST_VALUES} a byte; write the file as JSON lines"
        )


def _pages(data: mmap.mmap, column: "ColumnChunkMetaData") -> Iterator[tuple[int, int, int]]:
    """Unpacked bytes, packed bytes and number of values of each page; dictionaries have none."""
    starts = [column.data_page_offset, column.dictionary_page_offset]
    at = min(start for start in starts if start)
    end = at + column.total_compressed_size
    if not 0 < at <= end <= len(data):
        raise ValueError("a column lies outside the file")
    while at < end:
        header, at = _structure(data, at)
        unpacked, packed = header.get(_UNPACKED), header.get(_PACKED)
        head = next((field for field in _HEADS if isinstance(header.get(field), dict)), None)
        if head is None or not isinstance(unpacked, int) or not isinstance(packed, int):
            raise ValueError("a page without a description")
        at += packed
        if packed < 0 or at > end:
            raise ValueError("a page lies outside its column")
        values = 0 if head == _DICTIONARY else header[head].get(1)
        if not isinstance(values, int) or values < 0:
            raise ValueError("a page without a number of values")
        yield unpacked, packed, values


def _structure(data: mmap.mmap, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Decode the structure at an offset; return its fields by number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _number(data, at)
        kind = head & 15
        if kind in (1, 2):  # true, false
            fields[number] = kind == 1
        elif kind in (4, 5, 6):  # whole numbers of 16, 32, 64 bits
            fields[number], at = _number(data, at)
        elif kind == 8:  # text, with its length before it
            length, at = _digits(data, at)
            at += length
        elif kind == 12 and depth < 4:
            fields[number], at = _structure(data, at, depth + 1)
        else:
            raise ValueError("a page header with fields of an unknown kind")
    return fields, at + 1


def _number(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A signed number: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    digits, at = _digits(data, at)
    return digits >> 1 ^ -(digits & 1), at


def _digits(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        value |= (data[at + place] & 127) << 7 * place
        if data[at + place] < 128:
            return value, at + place + 1
    raise ValueError("a number without an end")

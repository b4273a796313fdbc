"""Parquet and Arrow files, one row at a time."""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bidistill.data.sources.limits import LARGEST_BATCH
from bidistill.data.sources.lines import read_head
from bidistill.data.sources.pages import check_pages
from bidistill.data.sources.rows import Row, shown
from bidistill.errors import UserError

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Without it a file is cut off, which Arrow takes for its end if it happens between batches."""


def parquet(path: Path, wanted: frozenset[str]) -> Iterator[Row]:
    """Read a Parquet file.

    Args:
        path: the file.
        wanted: the names of the columns to unpack, in lower case.

    Yields:
        The rows, with None for what is not wanted.

    Raises:
        UserError: the file is damaged, or unpacks to more than `limits` allows.
    """
    import pyarrow.parquet

    read_head(path)  # a folder, a pipe or an empty file is refused in our words
    metadata = _guard(path, lambda: pyarrow.parquet.read_metadata(path))
    _guard(path, lambda: check_pages(path, metadata, wanted))
    columns = [metadata.schema.column(at) for at in range(metadata.num_columns)]
    # left as dictionaries: in a few bytes, each of many rows can point to the same huge text
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    open_it = pyarrow.parquet.ParquetFile
    with _guard(path, lambda: open_it(path, metadata=metadata, read_dictionary=texts)) as file:
        names = _guard(path, lambda: file.schema_arrow.names)
        kept = [name for name in names if name.strip().casefold() in wanted]
        batches = _guard(path, lambda: file.iter_batches(batch_size=1024, columns=kept))
        yield from _rows(path, names, batches)


def arrow_stream(path: Path, wanted: frozenset[str], done: int = 0) -> Iterator[Row]:
    """Read an Arrow file as ``datasets`` writes it; it is mapped, so it may exceed memory.

    Args:
        path: the file.
        wanted: the names of the columns to look at, in lower case.
        done: how many rows came before it, for messages.

    Raises:
        UserError: the file is damaged, or its batches are packed.
    """
    import pyarrow

    read_head(path)
    with _guard(path, lambda: pyarrow.memory_map(str(path))) as source:
        if _guard(path, lambda: source.read_at(8, max(0, source.size() - 8))) != _END:
            raise UserError(
                f"{shown(path)}: got a file without an end, expected a complete one; save it again"
            )
        source.seek(0)
        if _guard(path, lambda: _has_packed_batches(source)):
            raise UserError(
                f"{shown(path)}: got packed batches, expected plain ones; load the data set with "
                "`datasets` and save it again"
            )
        source.seek(0)
        reader = _guard(path, lambda: pyarrow.ipc.open_stream(source))
        names = reader.schema.names
        kept = [name for name in names if name.strip().casefold() in wanted]
        yield from _rows(path, names, (_sound(batch, kept) for batch in reader), done)


def _sound(batch: "pyarrow.RecordBatch", names: list[str]) -> "pyarrow.RecordBatch":
    """The wanted columns, once it is known that no offset in them points out of the file."""
    batch = batch.select(names)
    batch.validate(full=True)
    return batch


def _rows(
    path: Path, names: list[str], batches: "Iterable[pyarrow.RecordBatch]", done: int = 0
) -> Iterator[Row]:
    """Rows of batches, converted one at a time."""
    keys = [name.strip().casefold() for name in names]
    if len(set(keys)) < len(keys):
        raise UserError(
            f"{shown(path)}: got two columns whose names differ in case or space only, expected "
            "one; rename one"
        )
    nothing = dict.fromkeys(keys)
    rows = (row for batch in batches for row in _converted(batch))
    while (values := _guard(path, lambda: next(rows, None), done)) is not None:
        done += 1
        named = {name.strip().casefold(): value for name, value in values.items()}
        yield Row(f"{shown(path)}, row {done}", {**nothing, **named})


def _converted(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, object]]:
    """Rows as Python objects, in as many steps as keep what is held small."""
    size = batch.num_rows * 64 + sum(map(_text_bytes, batch.columns))
    if size <= LARGEST_BATCH:
        yield from batch.to_pylist()
    elif batch.num_rows > 1:
        middle = batch.num_rows // 2
        yield from _converted(batch.slice(0, middle))
        yield from _converted(batch.slice(middle))
    else:
        raise ValueError(f"a row of {size} bytes, more than {LARGEST_BATCH}")


def _text_bytes(array: "pyarrow.Array") -> int:
    """Bytes of an array once each of its values is an object of its own."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        lengths = compute.call_function("binary_length", [array.dictionary])
        return compute.call_function("sum", [lengths.take(array.indices)]).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    if types.is_nested(array.type):
        values = array.flatten()
        return 64 * len(values) + _text_bytes(values)
    return array.nbytes


def _has_packed_batches(source: "pyarrow.NativeFile") -> bool:
    """Ask the headers: what a batch unpacks to is known only once it is unpacked."""
    import pyarrow

    return any(
        message.type == "record batch" and _is_packed(message.metadata.to_pybytes())
        for message in pyarrow.ipc.MessageReader.open_stream(source)
    )


def _is_packed(message: bytes) -> bool:
    """Whether the header of a record batch, a flatbuffer, has the field ``compression``."""

    def field(table: int, number: int) -> int:
        """Where a field of a table stands; 0 if it is left out."""
        vtable = table - struct.unpack_from("<i", message, table)[0]
        entry = 4 + 2 * number  # after the sizes of the vtable and of the table
        if entry >= struct.unpack_from("<H", message, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", message, vtable + entry)[0]
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + struct.unpack_from("<I", message, at)[0]

    batch = follow(field(follow(0), 2))  # version, kind of header, header
    return field(batch, 3) != 0  # length, nodes, buffers, compression


def _guard(path: Path, call: Callable[[], T], row: int | None = None) -> T:
    """Call Arrow; whatever it finds wrong with the file becomes one line."""
    import pyarrow

    try:
        return call()
    except (
        pyarrow.ArrowException,
        ArithmeticError,
        LookupError,
        MemoryError,
        OSError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        where = shown(path) if row is None else f"{shown(path)}, row {row + 1}"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: got damaged data ({reason[:120]}), expected complete columns; write the "
            "file again"
        ) from None

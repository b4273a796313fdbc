"""Examples on disk, mapped into memory: how many there are hardly matters to who reads them.

.. code-block:: text

    tokens.bin   int32      student's prompt, teacher's prompt, answer; example by example
    ids.bin      UTF-8      the ids, one after the other
    ends.bin     int64      a row an example: where those four end; before them a row of zeros
    roles.bin    uint8      index into ROLES
    store.json              names of the contexts; sizes and checksums of the files above

A teacher's prompt that is the student's is left out. Reading takes no copy: the ids of an example
are views of the map.

Legend: E examples.
"""

import json
import mmap
import sys
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from bidistill.data.records import ROLES, Role
from bidistill.data.views import Example, View
from bidistill.errors import UserError
from bidistill.files import file_sha256, write_json

FORMAT = 1
"""Raised when the files change; stores of an older one are made again."""
HEADER = "store.json"
FILES = ("tokens.bin", "ids.bin", "ends.bin", "roles.bin")
RELEASE_EVERY = 32
"""Examples read between two times that the pages of the map are given back: all that is mapped
counts as this process's memory, and a read of 2 KB was seen to map 0.5 MB around it, on Linux
6.18."""


class TokenStore(Sequence[Example]):
    """The examples of a folder, in the order in which they were written.

    Args:
        folder: as :func:`write_store` made it.

    Raises:
        UserError: the folder is not a whole token store of this version.
    """

    def __init__(self, folder: Path) -> None:
        """Map the files."""
        header = _read_header(folder)
        if header is None:
            raise UserError(
                f"{folder}: got a token store that is damaged or of another version, expected "
                f"{HEADER} and the files it names; delete the folder, it is made again"
            )
        self.digest = _digest(header)
        """Says which examples these are, whatever made the store."""
        self._names: dict[Role, str] = header["contexts"]
        maps = [_map(folder / name) for name in FILES]
        self._released, (tokens, ids, ends, roles) = maps[0], map(memoryview, maps)
        self._tokens, self._ids, self._roles = tokens.cast("i"), ids, roles
        self._ends = ends.cast("q")
        self._reads = 0

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._roles)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # from the end if negative, IndexError if too large
        self._count_read()
        _, _, start, id_start, student_end, teacher_end, end, id_end = self._ends[
            4 * index : 4 * index + 8
        ].tolist()
        role = ROLES[self._roles[index]]
        student = teacher = View(self._tokens[start:student_end], "student")
        if teacher_end > student_end:
            teacher = View(self._tokens[student_end:teacher_end], self._names[role])
        name = str(self._ids[id_start:id_end], "utf-8")
        return Example(name, role, student, teacher, self._tokens[teacher_end:end])

    @property
    def roles(self) -> NDArray[np.uint8]:
        """Index into ``ROLES`` of each example. Shape (E,)."""
        return np.frombuffer(self._roles, np.uint8)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example in the student's view, with the answer. Shape (E,)."""
        ends = np.frombuffer(self._ends, np.int64).reshape(-1, 4)
        return ends[1:, 0] - ends[:-1, 2] + ends[1:, 2] - ends[1:, 1]

    def _count_read(self) -> None:
        """Give back the pages now and then; what is read again is mapped again."""
        self._reads += 1
        if self._reads % RELEASE_EVERY == 0 and isinstance(self._released, mmap.mmap):
            self._released.madvise(mmap.MADV_DONTNEED)


class Selection(Sequence[Example]):
    """The examples of a store that have certain roles, in its order; read when they are asked for.

    Args:
        store: where they are read from.
        roles: whose examples belong to it.
    """

    def __init__(self, store: TokenStore, roles: Collection[Role]) -> None:
        """Find the examples."""
        wanted = sorted(ROLES.index(role) for role in roles)
        self._store, self._indices = store, np.flatnonzero(np.isin(store.roles, wanted))
        self.digest = sha256(repr((store.digest, wanted)).encode()).hexdigest()[:16]
        """Says which examples these are."""

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return one example or several."""
        if isinstance(index, slice):
            return [self._store[i] for i in self._indices[index].tolist()]
        return self._store[int(self._indices[index])]


class Encoded(NamedTuple):
    """Examples in the form of the files; ends count from the first of them."""

    tokens: NDArray[np.int32]
    ids: bytes
    ends: NDArray[np.int64]
    """Shape (E, 4)."""
    roles: bytes


def encode(examples: Sequence[Example]) -> Encoded:
    """Put examples in the form of the files.

    Args:
        examples: any number of them.
    """
    parts: list[Sequence[int]] = []
    for e in examples:
        teacher = () if e.teacher == e.student else e.teacher.prompt_ids
        parts += e.student.prompt_ids, teacher, e.answer_ids
    ids = [e.id.encode() for e in examples]
    ends = np.empty((len(examples), 4), np.int64)
    ends[:, :3] = np.cumsum([len(part) for part in parts], dtype=np.int64).reshape(-1, 3)
    ends[:, 3] = np.cumsum([len(name) for name in ids], dtype=np.int64)
    roles = bytes(ROLES.index(e.role) for e in examples)
    return Encoded(np.fromiter(chain.from_iterable(parts), np.int32), b"".join(ids), ends, roles)


def write_store(folder: Path, chunks: Iterable[Encoded], names: dict[Role, str]) -> None:
    """Write a token store, chunk after chunk.

    Args:
        folder: to be made; use `bidistill.files.atomic_path`, so that nobody sees half of it.
        chunks: the examples, in order; how they are cut does not show in the files.
        names: of the context of each role that has one.
    """
    folder.mkdir()
    header = {"format": FORMAT, "byteorder": sys.byteorder, "contexts": names}
    digests = [sha256() for _ in FILES]
    files = [(folder / name).open("wb") for name in FILES]
    try:
        last = np.zeros(4, np.int64)
        zeros = Encoded(np.empty(0, np.int32), b"", last[None], b"")
        for chunk in chain([zeros], chunks):
            ends = chunk.ends + last[[2, 2, 2, 3]]
            last = ends[-1]
            parts = chunk.tokens.tobytes(), chunk.ids, ends.tobytes(), chunk.roles
            for file, digest, data in zip(files, digests, parts, strict=True):
                file.write(data)
                digest.update(data)
    finally:
        for file in files:
            file.close()
    noted = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest.hexdigest()}
        for name, digest in zip(FILES, digests, strict=True)
    }
    write_json(folder / HEADER, {**header, "files": noted})


def is_whole(folder: Path, *, thorough: bool = False) -> bool:
    """Whether a folder is a token store of this version, complete by the sizes of its files.

    Args:
        folder: need not exist.
        thorough: compare checksums too.
    """
    header = _read_header(folder)
    return header is not None and (
        not thorough or all(file_sha256(folder / n) == header["files"][n]["sha256"] for n in FILES)
    )


def _read_header(folder: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None if it is missing, of another version or not whole."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        notes, names = [header["files"][name] for name in FILES], header["contexts"]
        sizes = [note["bytes"] for note in notes]
        whole = (
            (header["format"], header["byteorder"]) == (FORMAT, sys.byteorder)
            and sizes == [(folder / name).stat().st_size for name in FILES]
            and sizes[2] == 32 * (sizes[3] + 1)
            and all(isinstance(note["sha256"], str) for note in notes)
            and isinstance(names, dict)
            and set(names) <= set(ROLES)
            and all(isinstance(name, str) for name in names.values())
        )
        return header if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _digest(header: dict[str, Any]) -> str:
    sums = [header["files"][name]["sha256"] for name in FILES]
    return sha256(repr((sums, sorted(header["contexts"].items()))).encode()).hexdigest()[:16]


def _map(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, read only; nothing cannot be mapped."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # examples are drawn in random order
    return mapped

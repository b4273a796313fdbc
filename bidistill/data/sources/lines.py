"""Bytes to text: regular files only, UTF-8 only, one line of bounded length at a time."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bidistill.data.sources.limits import LONGEST_LINE
from bidistill.data.sources.rows import shown
from bidistill.errors import UserError

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh9": "bzip2",
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        UserError: it is missing, a folder, a pipe or a device (which may never end), or may not be
            read.
    """
    try:
        # asked first: opening a pipe waits for somebody to write to it
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise UserError(f"{shown(path)}: got {kind}, expected a file; name a file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{shown(path)}: got '{reason}', expected a file to read; check the path"
        ) from None


def read_head(path: Path, size: int = 4096) -> bytes:
    """Return the first bytes of a file that is neither empty nor packed."""
    with open_file(path) as file:
        try:
            head = file.read(size)
        except OSError as error:
            raise UserError(
                f"{shown(path)}: got '{error.strerror}', expected a file to read; check the disk"
            ) from None
    if not head:
        raise UserError(f"{shown(path)}: got an empty file, expected entries; check the path")
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            raise UserError(
                f"{shown(path)}: got a file packed with {kind}, expected an unpacked one; unpack it"
            )
    return head


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the lines of a file with their ends.

    Yields:
        The number of a line, from 1, and its text; a byte order mark is left out.

    Raises:
        UserError: the file cannot be read, or a line is longer than `LONGEST_LINE`, not UTF-8 or
            holds a NUL.
    """
    with open_file(path) as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UserError(
                    f"{shown(path)}:{number}: got a line of more than {LONGEST_LINE} bytes, "
                    "expected shorter ones; break it up"
                )
            refuse_binary(raw, path, number)
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(error, path, number) from None


def refuse_binary(raw: bytes, path: Path, line: int) -> None:
    """Refuse UTF-16 and bytes that no text holds; ``line`` is where ``raw`` begins."""
    if line == 1 and raw.startswith(_UTF16):
        raise UserError(f"{shown(path)}:1: got UTF-16, expected UTF-8; save the file as UTF-8")
    if (at := raw.find(b"\0")) >= 0:
        line += raw.count(b"\n", 0, at)
        raise UserError(
            f"{shown(path)}:{line}: got a NUL byte, expected UTF-8 text; save the file as UTF-8"
        )


def not_utf8(error: UnicodeDecodeError, path: Path, line: int) -> UserError:
    """Make the error for bytes that are not UTF-8; ``line`` is where they begin."""
    raw, at = error.object, error.start
    line += raw.count(b"\n", 0, at)
    column = at - raw.rfind(b"\n", 0, at)
    return UserError(
        f"{shown(path)}:{line}: got byte 0x{raw[at]:02x} at column {column}, expected UTF-8; "
        "save the file as UTF-8"
    )

"""Writing files so that nobody ever sees half of one.

Everything is written under a temporary name in the folder of the target and renamed when it is
complete: a killed process leaves the old version, or none.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from bidistill.errors import UserError

STEM = 32
"""Characters of a name that a temporary name keeps: at most 128 of the 255 bytes that file systems
allow, so that a name which fits does not fail for its temporary one."""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` once the block succeeds.

    The block creates a file or a folder at the temporary path. A file replaces an older file; a
    folder needs a target that does not exist yet. If the block raises, what it wrote is removed
    and ``path`` stays as it was. Missing parent folders are created.

    Args:
        path: where the result belongs. The temporary name keeps its suffix, for writers that
            choose the format by it.

    Raises:
        UserError: the parent folder cannot be created or written.
    """
    path = Path(path)
    _require_folder(path.parent)
    start, end = _around_token(path)
    temporary = path.with_name(f"{start}{secrets.token_hex(4)}{end}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written or created, before the work whose result it is to get.

    Nothing is created: a mistake that shows later leaves no empty folder.

    Raises:
        UserError: as said.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not there.is_dir():
        reason = f"{there} is no folder"
    elif not os.access(there, os.W_OK):
        reason = "no permission"
    else:
        return
    raise UserError(f"{folder}: cannot be written ({reason}); choose another folder")


def remove_temporary(path: Path) -> None:
    """Delete what killed processes have left of :func:`atomic_path`; none may be at it now."""
    start, end = _around_token(path)
    for left in path.parent.iterdir():
        if left.name.startswith(start) and left.name.endswith(end):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _around_token(path: Path) -> tuple[str, str]:
    """How the temporary names of ``path`` begin and end."""
    return f".{path.stem[:STEM]}.", f".tmp{path.suffix}"


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically and with the line ends given."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path | str, obj: object) -> None:
    """Write ``obj`` to ``path`` as indented JSON, atomically.

    Raises:
        TypeError: ``obj`` holds something that JSON has no form for.
        ValueError: ``obj`` holds NaN or an infinity, which JSON has no form for either.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything that follows."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def user_cache() -> Path:
    """Folder of what can be made again: ``$XDG_CACHE_HOME/bidistill`` or ``~/.cache/bidistill``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bidistill"


def _require_folder(folder: Path) -> None:
    """Create ``folder`` where it is missing; a user's mistake must not become a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); choose another folder"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written (no permission); choose another folder")

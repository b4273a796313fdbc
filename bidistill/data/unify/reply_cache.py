"""Replies of a model on disk, under a hash of what was asked."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from bidistill.errors import UserError

_TABLE = "create table if not exists replies (key text primary key, reply text not null)"
_LOOKUP = 500
"""Keys in one query; SQLite takes a limited number of variables."""
_PATIENCE_S = 60.0
"""How long another process may hold the file."""


class ReplyCache:
    """A file of replies; SQLite keeps a group of them as a whole or not at all.

    Args:
        path: the file; made with its folder if it is missing.

    Raises:
        UserError: the file cannot be made, or is not one of ours.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        self._path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_PATIENCE_S)
            try:
                self._connection.execute(_TABLE)
            except sqlite3.Error:
                self._connection.close()
                raise

    def find(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the replies that are there, by key."""
        found: dict[str, str] = {}
        with self._explained():
            for start in range(0, len(keys), _LOOKUP):
                some = keys[start : start + _LOOKUP]
                marks = ",".join("?" * len(some))
                query = f"select key, reply from replies where key in ({marks})"
                found.update(self._connection.execute(query, some).fetchall())
        return found

    def keep(self, replies: Mapping[str, str]) -> None:
        """Add replies, all or none of them; the first reply to a question stays."""
        with self._explained(), self._connection:
            self._connection.executemany(
                "insert or ignore into replies values (?, ?)", list(replies.items())
            )

    def __enter__(self) -> "ReplyCache":
        """Return the open cache."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Make one line of what SQLite or the file system has to say."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{self._path}: got '{error}', expected a file of kept replies that can be "
                "written; delete it, or set model.cache to another folder"
            ) from None

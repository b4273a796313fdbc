"""The output folder: whole or not at all, and never over somebody's work."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bidistill.data.sources.rows import shown
from bidistill.data.unify.manifest import MANIFEST, read, untouched
from bidistill.data.unify.recipe import Recipe, as_dict, hash_of
from bidistill.errors import UserError
from bidistill.files import STEM, atomic_path

_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EBUSY,
    errno.EXDEV,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
"""What a file system says that takes no more, or not at this place."""


def require_free(recipe: Recipe, overwrite: bool) -> None:
    """Refuse an output folder that holds anything but an earlier result to be replaced.

    Args:
        recipe: that names the folder.
        overwrite: whether an earlier result may be replaced, if nobody has changed it since.

    Raises:
        UserError: says what the folder holds.
    """
    folder = recipe.output
    name = shown(folder)
    if folder.name in ("", ".."):
        raise UserError(
            f"output: got '{name}', which is no name that a folder can be made under, expected a "
            "new folder; choose another output"
        )
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise UserError(
            f"output: got {name}, which cannot be read ({error.strerror}), expected a new "
            "folder; choose another output"
        ) from None
    if not folder.is_dir() or not (folder / MANIFEST).exists():
        raise UserError(
            f"output: got {name}, which holds something else, expected a new folder; choose "
            "another output"
        )
    if not overwrite:
        same = read(folder).recipe_sha256 == hash_of(as_dict(recipe))
        raise UserError(
            f"output: got {name}, which was made by {'this' if same else 'another'} recipe, "
            "expected a new folder; use --overwrite to replace it, or choose another output"
        )
    if not untouched(folder):
        raise UserError(
            f"output: got {name}, where files were added or changed since, expected what "
            f"{MANIFEST} tells of; move your files away, or choose another output"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `path` when the block succeeds.

    Where `path` is a link, it stays one: what it leads to is filled. If the block fails, folders
    that were made on the way to `path` are taken away again.

    Raises:
        UserError: the file system takes no more, or no folder of this name.
    """
    given, path = path, Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name[:STEM]}.{secrets.token_hex(4)}.old")
    missing = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            yield temporary
            if path.exists():
                os.replace(path, aside)
    except BaseException as error:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        with suppress(OSError):  # not empty: somebody else has begun to use it
            for parent in missing:
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise UserError(
                f"output: got {shown(given)}, which cannot be written ({error.strerror}), expected "
                "a folder with room for the result; make room there, or choose another output"
            ) from None
        raise
    if aside.exists():
        shutil.rmtree(aside)

"""The output folder: whole or not at all, and never over somebody's work."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bidistill.data.unify.manifest import MANIFEST, read, untouched
from bidistill.data.unify.recipe import Recipe, as_dict, hash_of
from bidistill.errors import UserError
from bidistill.files import atomic_path


def require_free(recipe: Recipe, overwrite: bool) -> None:
    """Refuse an output folder that holds anything but an earlier result to be replaced.

    Args:
        recipe: that names the folder.
        overwrite: whether an earlier result may be replaced, if nobody has changed it since.

    Raises:
        UserError: says what the folder holds.
    """
    folder = recipe.output
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise UserError(
            f"output: got {folder}, which cannot be read ({error.strerror}), expected a new "
            "folder; choose another output"
        ) from None
    if not folder.is_dir() or not (folder / MANIFEST).exists():
        raise UserError(
            f"output: got {folder}, which holds something else, expected a new folder; choose "
            "another output"
        )
    if not overwrite:
        same = read(folder).recipe_sha256 == hash_of(as_dict(recipe))
        raise UserError(
            f"output: got {folder}, which was made by {'this' if same else 'another'} recipe, "
            "expected a new folder; use --overwrite to replace it, or choose another output"
        )
    if not untouched(folder):
        raise UserError(
            f"output: got {folder}, where files were added or changed since, expected what "
            f"{MANIFEST} tells of; move your files away, or choose another output"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `path` when the block succeeds."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            yield temporary
            if path.exists():
                os.replace(path, aside)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise
    if aside.exists():
        shutil.rmtree(aside)

"""The folder of a data set that ``datasets`` saved; what it lists is taken from it alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bidistill.data.sources.arrow_files import arrow_stream
from bidistill.data.sources.limits import MIB
from bidistill.data.sources.lines import open_file
from bidistill.data.sources.rows import Row, brief, shown
from bidistill.errors import UserError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def datasets_folder(path: Path, wanted: frozenset[str]) -> Iterator[Row]:
    """Read a folder that ``Dataset.save_to_disk`` made.

    Args:
        path: the folder.
        wanted: the names of the columns to look at, in lower case.

    Raises:
        UserError: the folder has several splits, of which one is to be named; it is no such
            folder; or it lists files that are missing, damaged or outside it.
    """
    if (path / _SPLITS).exists():
        splits = _object(path / _SPLITS).get("splits")
        known = ", ".join(str(name) for name in splits) if isinstance(splits, list) else ""
        raise UserError(
            f"{shown(path)}: got a folder of splits, expected one of them; name the folder of one: "
            f"{brief(known)[1:-1]}"
        )
    done = 0
    for name in _data_files(path):
        for row in arrow_stream(path / name, wanted, done):
            done += 1
            yield row


def _data_files(folder: Path) -> list[str]:
    """The files that the folder's own list names, in its order."""
    state = folder / _STATE
    if not state.exists():
        raise UserError(
            f"{shown(folder)}: got a folder without {_STATE}, expected one that "
            "Dataset.save_to_disk made; name a file"
        )
    entries = _object(state).get("_data_files")
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{shown(state)}: _data_files: got no list of files, expected one; save the data set "
            "again"
        )
    return [_plain_name(entry, folder) for entry in entries]


def _plain_name(entry: object, folder: Path) -> str:
    """The name of one file, which lies in the folder itself, also when links are followed."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if isinstance(name, str) and name.isprintable() and name not in ("", ".", ".."):
        inside = Path(name).name == name and "\\" not in name
        if inside and (folder / name).resolve().parent == folder.resolve():
            return name
    raise UserError(
        f"{shown(folder / _STATE)}: filename: got {brief(name)}, expected the name of a file in "
        "this folder; save the data set again"
    )


def _object(path: Path) -> dict[str, Any]:
    with open_file(path) as file:
        try:
            value = json.loads(file.read(MIB))
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise UserError(f"{shown(path)}: got no JSON object, expected one; save the data set again")
    return value

"""Making a store of the teacher, on one process or several.

.. code-block:: text

    examples --cut--> files of rows --rank r: files r, r + world_size, ...--> one temporary folder
             --rank 0, when all have met: index, head, header--> the folder gets its name

How the rows are cut into files depends on the examples, bytes a row and ``FILE_BYTES`` alone, and
each file is computed by itself. So on machines of one kind the bytes are the same whatever the
number of ranks; another processor, or another number of threads, may round a last bit differently.

What a row has is a matter of the store's form, see ``forms.py``. Legend: E examples.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bidistill.data.views import Example
from bidistill.distributed import put_back
from bidistill.errors import UserError
from bidistill.files import atomic_path, write_json
from bidistill.progress import track
from bidistill.teacher.compute import chunks
from bidistill.teacher.forms import Form, Hidden
from bidistill.teacher.store import FORMAT, HEAD, HEADER, INDEX, ROWS, describe, key_of, problem_of
from bidistill.world import World

FILE_BYTES = 64 << 20
"""Of the rows of a file, at most; more only where one example alone has more. As much is held in
memory while a file is made."""


def build_rows(
    model: nn.Module,
    examples: Sequence[Example],
    folder: Path,
    made_of: Mapping[str, Any],
    world: World | None = None,
    *,
    form: Form | None = None,
) -> None:
    """Run the teacher over all examples and write its rows; the folder appears when it is whole.

    The ranks meet at every pack, before rank 0 writes the header, and once the folder has its name.
    A rank that fails leaves the others waiting until whoever started them ends them, as torchrun
    does.

    Args:
        model: the student, untrained, whose adapters are off inside; or another model. Where it is
            shared out, the ranks run a pack each at a time, together.
        examples: at least one; the same ones, in the same order, on each rank.
        folder: to be made, on a disk that all ranks see.
        made_of: what the rows follow from, as JSON; written to the header.
        world: the ranks; None: this process alone.
        form: what is kept; None: hidden rows.

    Raises:
        UserError: the folder cannot be written.
        ValueError: there are no examples.
    """
    world, form = world or World(), form or Hidden()
    if not examples:
        raise ValueError("examples: got none, expected at least one; give those that are trained")
    index = _index(examples)
    try:
        with _staging(folder, world) as temporary:
            dtype, own = _fill(form, model, examples, index, temporary, world)
            put_back(model)
            notes = {name: note for part in world.gather(own) for name, note in part.items()}
            head = dict(zip(("weight", "bias"), form.head(model), strict=True))
            if world.first:
                notes |= _write(temporary / INDEX, index.tensors())
                if kept := {name: tensor for name, tensor in head.items() if tensor is not None}:
                    notes |= _write(temporary / HEAD, kept)
                header = {"format": FORMAT, "kind": form.kind, "made_of": made_of}
                header |= {"computed": dtype, "files": dict(sorted(notes.items()))}
                write_json(temporary / HEADER, header)
    except (OSError, SafetensorError) as error:
        if problem_of(folder, made_of) is not None:  # else another process was done first
            raise UserError(
                f"{folder}: cannot be written ({' '.join(str(error).split())}); make room there, "
                "or choose another folder with teacher.cache_folder"
            ) from None
    world.barrier()


class Index(NamedTuple):
    """What each example is found by, and where its rows lie among all rows."""

    keys: NDArray[np.int64]
    """Halves of the hash of each example. Shape (E, 2)."""
    starts: NDArray[np.int64]
    """First row of each example, and one past the last row of all. Shape (E + 1,)."""

    def tensors(self) -> dict[str, Tensor]:
        """In the form of the file: sorted, so that a key is found without reading all of it."""
        order = np.lexsort((self.keys[:, 1], self.keys[:, 0]))
        key, check = self.keys[order].T.copy()
        same = key[1:] == key[:-1]
        assert (check[1:] == check[:-1])[same].all(), "different examples share half of a hash"
        columns = {"key": key, "check": check, "row": self.starts[:-1][order]}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    def cuts(self, most: int) -> list[int]:
        """Examples at which files begin, and one past the last, with ``most`` rows a file."""
        cuts = [0]
        while cuts[-1] < len(self.keys):
            limit = self.starts[cuts[-1]] + most
            stop = int(np.searchsorted(self.starts, limit, side="right")) - 1
            cuts.append(max(stop, cuts[-1] + 1))
        return cuts


def _index(examples: Sequence[Example]) -> Index:
    """Go through all examples once."""
    keys, ends = array("q"), array("q", [0])
    for example in examples:
        keys.extend(key_of(example).tolist())
        ends.append(ends[-1] + len(example.answer_ids))
    return Index(np.frombuffer(keys, np.int64).reshape(-1, 2), np.frombuffer(ends, np.int64))


def _fill(
    form: Form,
    model: nn.Module,
    examples: Sequence[Example],
    index: Index,
    folder: Path,
    world: World,
) -> tuple[str, dict[str, Any]]:
    """Compute and write the files of a rank; the dtype of the rows and a note of each file."""
    columns = form.columns(model)
    row_bytes = sum(dtype.itemsize * width for dtype, width in columns.values())
    cuts = index.cuts(FILE_BYTES // row_bytes)
    mine = range(world.rank, len(cuts) - 1, world.size)
    rows: Iterable[Rows] = _rows(form, model, examples, index, cuts, mine, world)
    if world.first:
        rows = track(rows, sum(cuts[number + 1] - cuts[number] for number in mine), "teacher")
    dtype, notes = "", {}
    for number, parts in groupby(rows, key=lambda part: part[0]):
        first, last = index.starts[[cuts[number], cuts[number + 1]]].tolist()
        file = {
            name: torch.empty(last - first, width, dtype=kept)
            for name, (kept, width) in columns.items()
        }
        for _, start, part in parts:
            for name, rows_of in part.items():
                file[name][start - first : start - first + len(rows_of)] = rows_of
                if rows_of.is_floating_point():
                    dtype = str(rows_of.dtype).removeprefix("torch.")
        notes |= _write(folder / ROWS.format(number), file)
    return dtype, notes


Rows: TypeAlias = tuple[int, int, Mapping[str, Tensor]]
"""Columns of an example, after the number of their file and of their first row."""


def _rows(
    form: Form,
    model: nn.Module,
    examples: Sequence[Example],
    index: Index,
    cuts: list[int],
    files: range,
    world: World,
) -> Iterator[Rows]:
    """The rows of each example of some files, with the file's number and where they begin."""

    def work() -> Iterator[tuple[int, dict[int, int], list[Example]]]:
        for number in files:
            here = examples[cuts[number] : cuts[number + 1]]
            starts = index.starts[cuts[number] : cuts[number + 1]].tolist()
            start_of = {id(example): start for example, start in zip(here, starts, strict=True)}
            for pack in chunks(here):
                yield number, start_of, pack

    left = work()
    # all run the model equally often, as it may be shared out: who has nothing left helps
    while world.any((mine := next(left, None)) is not None):
        number, start_of, pack = mine or (None, {}, [examples[0]])
        for example, rows in zip(pack, form.rows(model, pack), strict=True):
            if number is not None:
                yield number, start_of[id(example)], rows


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file; its name with what the header says of it."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    return {path.name: describe(path, thorough=True)}


@contextmanager
def _staging(folder: Path, world: World) -> Iterator[Path]:
    """A temporary folder for all ranks, which gets its name when the first leaves the block."""
    if not world.first:
        yield folder.with_name(world.share(""))
        return
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        world.share(temporary.name)
        yield temporary

"""The teacher on disk: a row for each answer token, and no teacher while training.

.. code-block:: text

    rows-000000.safetensors  hidden; or ids, log_probs  answer token by answer token
    rows-000001.safetensors  ...                        an example's rows lie in one file
    index.safetensors        key, check, row I64 (E,)   where each example's rows begin, by key
    head.safetensors         weight (V, H), bias (V,)   beside hidden, unless the student's serves
    store.json               kind, what it was made of; bytes, tensors and checksum of each file

What a row has, for each kind of store, stands in ``forms.py``.

An example is found by what the teacher read: a hash of its prompt's and its answer's tokens, of
which ``key`` and ``check`` are the halves. Its id does not matter.

Legend: E examples, N answer rows of a batch, H hidden width, K ids, V vocabulary.
"""

import json
import mmap
import os
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bidistill.data.loader import Batch
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.files import file_sha256
from bidistill.teacher.forms import FORMS
from bidistill.teacher.rows import TeacherRows, TeacherTopK

FORMAT = 2
"""Raised when the files change; stores of an older one are made again."""
HEADER = "store.json"
INDEX = "index.safetensors"
HEAD = "head.safetensors"
ROWS = "rows-{:06}.safetensors"
OPEN_FILES = 128
"""Files of rows that are mapped at a time; each takes a file descriptor."""
# bf16 as int16, for NumPy knows none; the bits are what counts
NUMPY_TYPES = {
    "BF16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


class TeacherStore:
    """The teacher's rows of every example, on disk; stands where ``HiddenCache`` does.

    It has hidden rows, or the best ids of each row, as its header says.

    Files are mapped and their pages given back after each read: resident memory does not grow
    with the rows, only with the part of the index that is looked at, at most 24 bytes an example.

    Precision of hidden rows: they are those that the teacher computed, each entry rounded to bf16
    and put back into the dtype it had; the rest of the step is exactly as with the teacher in
    memory, the head included. bf16 keeps 8 bits, so an entry h moves by at most u |h|, u = 2^-8
    (half of the spacing 2^-7 of the numbers from 1 to 2), and the logit of a word v by at most
    u sum_k |W_vk h_k|; let d be the largest such change of a row, after the scale of the logits
    and divided by the temperature (a soft-cap only lessens it), and R the range, over the
    vocabulary, of teacher's less student's logits. Then the losses of the row move by at most

    .. code-block:: text

        KL(teacher || student)   d (R + d) / 2
        KL(student || teacher)   2 d

    For the first, with r_v = log p_v - log q_v: its derivative by teacher logit v is
    p_v (r_v - sum p r), the magnitudes of which sum up to half the range of r at most, and on the
    way that range grows from R to R + 2 d at most. The second is the mean of the changes under q
    less that of the log-sum-exp, both of which lie between -d and d. So a student that still is
    its teacher has a loss a little above zero.

    Precision of best ids: the log-probabilities of the K ids, and of all others together, are
    rounded to fp16 and made to add up to 1 again. A log-probability a moves by at most u |a|,
    u = 2^-11 (2^-25 for those nearer to 0 than 2^-14), before they are. That is as if logits of
    K + 1 outcomes had moved by so much, so rounding moves ``topk_kl`` within the bounds above:
    d is u times the largest |a| of a row, and R the range of teacher's less student's
    log-probabilities over the outcomes; with ``tail: renormalize``, over the ids alone. The
    log-probability of the others is kept although it follows from the rest: 1 less a sum of
    rounded numbers would be off by u times the entropy, more than most tails are.

    Rounding is not all for ``tail: bucket``: the kernels take the teacher's probability t of all
    other ids for 1 less the sum of the K, and for 1e-6 at least. In fp32 that sum is off by a few
    1e-7, once when the store is made and once in the loss. Let e = 1e-6, which is the floor, and
    measured about the most that both errors come to for K = 64 (5e-6 for K = 1,024), and q the
    student's probability of the others. Then the loss sees t times or over 1 + 2 e / t at most, and

    .. code-block:: text

        KL(teacher || student)   moves by e (R + ln(1 + 2 e / t)) more
        KL(student || teacher)   moves by q ln(1 + 2 e / t) + e more

    The first is lost in the rounding. The second is not where t is small and the student is far
    away: 0.18 q nats at t = 1e-5, 0.69 q at 2e-6, 5.3 q at 1e-8.

    Args:
        folder: as ``build_rows`` made it.
        device: where the head is to lie, if the store has one; rows are given on the CPU.
        verify: compare checksums, which reads all of it; None: if the environment variable
            ``BIDISTILL_VERIFY`` is 1. Sizes and headers are always compared.

    Raises:
        UserError: the folder is not a whole store of this version.
    """

    def __init__(
        self, folder: Path, *, device: torch.device | str = "cpu", verify: bool | None = None
    ) -> None:
        """Check the files; rows are mapped when they are asked for."""
        if verify is None:
            verify = os.environ.get("BIDISTILL_VERIFY") == "1"
        if problem := problem_of(folder, thorough=verify):
            raise UserError(f"{problem}; run bidistill teacher-cache, which makes it again")
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        files = header["files"]
        parts = [note["tensors"] for name, note in files.items() if name not in (INDEX, HEAD)]
        self._columns = {
            name: (NUMPY_TYPES[t["dtype"]], t["shape"][1]) for name, t in parts[0].items()
        }
        counts = [next(iter(tensors.values()))["shape"][0] for tensors in parts]
        self._firsts = np.cumsum([0, *counts])
        self._computed = getattr(torch, header["computed"])
        self._read = FORMS[header["kind"]].read
        self._index = map_tensors(folder / INDEX)[1]
        self._map = lru_cache(OPEN_FILES)(lambda n: map_tensors(folder / ROWS.format(n)))
        head = load_file(folder / HEAD, device=str(device)) if HEAD in files else {}
        self.weight, self.bias = head.get("weight"), head.get("bias")
        self.tokens = int(self._firsts[-1])
        """Answer tokens of all examples."""
        sizes = (dtype.itemsize * width for dtype, width in self._columns.values())
        self.bytes_per_token = sum(sizes)
        """Of the rows alone, without index and head."""

    def for_batch(self, batch: Batch) -> TeacherRows | TeacherTopK:
        """The rows of a batch, in the order of its packs.

        Args:
            batch: of examples whose rows the store has.

        Returns:
            Rows of shape (N, H) in the dtype that the teacher computed them in, and the head; or
            ids and log-probabilities of shape (N, K).

        Raises:
            ValueError: the store has no rows of one of the examples.
        """
        lengths = [len(example.answer_ids) for example in batch.examples]
        shape_of = {name: (sum(lengths), width) for name, (_, width) in self._columns.items()}
        rows = {name: np.empty(shape_of[name], dtype) for name, (dtype, _) in self._columns.items()}
        end = 0
        for example, length in zip(batch.examples, lengths, strict=True):
            start, end = end, end + length
            row = self._find(example)
            number = int(np.searchsorted(self._firsts, row, side="right")) - 1
            mapped, tensors = self._map(number)
            row -= self._firsts[number]
            for name, column in rows.items():
                column[start:end] = tensors[name][row : row + length]
            mapped.madvise(mmap.MADV_DONTNEED)
        columns = {name: _as_tensor(column) for name, column in rows.items()}
        return self._read(columns, self._computed, (self.weight, self.bias))

    def _find(self, example: Example) -> int:
        """First row of an example among all rows."""
        key, check = key_of(example).tolist()
        at = int(np.searchsorted(self._index["key"], key))
        known = at < len(self._index["key"]) and self._index["key"][at] == key
        if not known or self._index["check"][at] != check:
            raise ValueError(
                f"batch: got example '{example.id}', of which the store has no rows, expected one "
                "of those that it was made of; make a store of these examples"
            )
        return int(self._index["row"][at])


def _as_tensor(column: NDArray[Any]) -> torch.Tensor:
    """A column of rows, without a copy."""
    tensor = torch.from_numpy(column)
    return tensor.view(torch.bfloat16) if column.dtype == NUMPY_TYPES["BF16"] else tensor


def key_of(example: Example) -> NDArray[np.int64]:
    """What an example's rows are found by: a hash of the tokens that the teacher reads.

    Returns:
        128 bits as two numbers. Shape (2,).
    """
    prompt = np.asarray(example.teacher.prompt_ids, np.int32)
    digest = blake2b(len(prompt).to_bytes(8, "little") + prompt.tobytes(), digest_size=16)
    digest.update(np.asarray(example.answer_ids, np.int32).tobytes())
    return np.frombuffer(digest.digest(), "<i8")


def problem_of(
    folder: Path, made_of: Mapping[str, Any] | None = None, *, thorough: bool = False
) -> str | None:
    """Say what is wrong with a store, or None if it is whole; sizes and headers always count.

    Args:
        folder: need not exist.
        made_of: what the rows should follow from; None takes whatever the header says.
        thorough: compare checksums too, which reads all of it.

    Returns:
        ``<file>: got ..., expected ...``, of the first file that is wrong.
    """
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if (found := header["format"]) != FORMAT:
            return f"{path}: got format {found}, expected {FORMAT}"
        if made_of is not None and header["made_of"] != made_of:
            return f"{path}: got rows made of something else, expected what its name stands for"
        for name, noted in header["files"].items():
            path = folder / name
            for item, found in describe(path, thorough=thorough).items():
                if found != noted[item]:
                    return f"{path}: got {item} {found}, expected {noted[item]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        return f"{path}: got nothing that can be read ({reason}), expected a part of a store"
    return None


def describe(path: Path, *, thorough: bool) -> dict[str, Any]:
    """Bytes and tensors of a safetensors file, and its checksum if ``thorough``.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no header.
    """
    note = {"bytes": path.stat().st_size, "tensors": _tensors(path)[0]}
    return {**note, "sha256": file_sha256(path)} if thorough else note


def map_tensors(path: Path) -> tuple[mmap.mmap, dict[str, NDArray[Any]]]:
    """Map a safetensors file.

    Returns:
        The map, and the tensors of the file as views of it; bf16 as int16.
    """
    tensors, begin = _tensors(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    views = {
        name: np.frombuffer(
            mapped, NUMPY_TYPES[t["dtype"]], int(np.prod(t["shape"])), begin + t["data_offsets"][0]
        ).reshape(t["shape"])
        for name, t in tensors.items()
    }
    return mapped, views


def _tensors(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path}: got a header of {size} bytes, expected a smaller one")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size

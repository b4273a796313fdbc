"""Many sequences on one token axis: no padding, and what they share is computed once.

Sequences of one context begin with the same tokens (system message, few-shot turns). That prefix is
laid down once, and attention lets every sequence of the group look back at it:

.. code-block:: text

    token axis      [prefix A][own 0][own 3][own 1][prefix B][own 2][own 4]
    position         0 1 2 3   4 5    4 5    4 5 6   0 1      2 3    2 3

Positions go on after the prefix, so a packed run equals separate runs, gradients included. With a
context of 150 tokens and 24 questions of 25 tokens, 750 tokens are run instead of 4,200.

Legend: T tokens of the pack, N rows that predict an answer token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from bidistill.data.views import View


class Segment(NamedTuple):
    """A run of tokens that attend to each other causally, and to a prefix if there is one."""

    start: int
    """First token on the token axis."""
    end: int
    """One past the last token."""
    prefix: tuple[int, int] | None
    """Start and end of the tokens before it that it also sees; their positions start at 0."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences ready for one forward pass of a model with packed attention."""

    input_ids: Int64[Tensor, "1 T"]
    position_ids: Int64[Tensor, "1 T"]
    """The position of each token in its own sequence."""
    segments: tuple[Segment, ...]
    """A partition of the token axis, in order."""
    rows: Int64[Tensor, " N"]
    """Where the hidden states are that predict an answer token; sequence by sequence as they were
    given, answer token by answer token."""
    target: Int64[Tensor, " N"]
    """The answer token that each row predicts."""
    sequence: Int64[Tensor, " N"]
    """Which of the given sequences each row belongs to."""


def pack(sequences: Sequence[tuple[View, Sequence[int]]]) -> Packed:
    """Lay prompts and answers on one token axis, with the prefixes of each context shared.

    The prefix of a context is the longest start that all its prompts have in common, short of the
    last prompt token, whose hidden state predicts the first answer token. A context with a single
    sequence has none. The last answer token is a target only: nothing is predicted from it.

    Args:
        sequences: pairs of a view and the answer's tokens; at least one, and no prompt empty.

    Returns:
        The pack. Contexts follow in order of appearance, sequences of a context by length, so that
        attention can take equal lengths together.

    Raises:
        ValueError: there is no sequence, or a prompt has no token.

    Example:
        >>> packed = pack([(View((1, 2, 3), "c"), (7, 8)), (View((1, 2, 4), "c"), (9,))])
        >>> packed.input_ids.tolist(), packed.position_ids.tolist()
        ([[1, 2, 4, 3, 7]], [[0, 1, 2, 2, 3]])
        >>> packed.rows.tolist(), packed.target.tolist(), packed.sequence.tolist()
        ([3, 4, 2], [7, 8, 9], [0, 0, 1])
    """
    prompts = [np.asarray(view.prompt_ids, np.int64) for view, _ in sequences]
    answers = [np.asarray(answer, np.int64) for _, answer in sequences]
    if not prompts or not all(map(len, prompts)):
        raise ValueError("sequences: got none, or one without a prompt; give prompts with tokens")
    pieces: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    shifts: list[int] = []  # of each segment: its place on the token axis less its position
    first_row = [0] * len(sequences)

    def lay(size: int, position: int, prefix: tuple[int, int] | None) -> int:
        start = segments[-1].end if segments else 0
        segments.append(Segment(start, start + size, prefix))
        shifts.append(start - position)
        return start

    for members in _by_context(sequences):
        shared = _shared_length([prompts[i] for i in members])
        prefix = None
        if shared:
            pieces.append(prompts[members[0]][:shared])
            start = lay(shared, 0, None)
            prefix = start, start + shared
        own = {i: len(prompts[i]) - shared + max(len(answers[i]) - 1, 0) for i in members}
        for i in sorted(members, key=own.__getitem__):
            pieces += prompts[i][shared:], answers[i][:-1]
            first_row[i] = lay(own[i], shared, prefix) + len(prompts[i]) - shared - 1

    sizes = [segment.end - segment.start for segment in segments]
    lengths = [len(answer) for answer in answers]
    before = np.cumsum(
        [0, *lengths[:-1]], dtype=np.int64
    )  # answer tokens of the sequences before each
    return Packed(
        input_ids=torch.from_numpy(np.concatenate(pieces)[None]),
        position_ids=torch.from_numpy(_counted(shifts, sizes)[None]),
        segments=tuple(segments),
        rows=torch.from_numpy(_counted(before - first_row, lengths)),
        target=torch.from_numpy(np.concatenate(answers)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(answers)), lengths)),
    )


def _by_context(sequences: Sequence[tuple[View, Sequence[int]]]) -> list[list[int]]:
    """Indices of the sequences of each context, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, (view, _) in enumerate(sequences):
        groups.setdefault(view.context, []).append(index)
    return list(groups.values())


def _shared_length(prompts: list[NDArray[np.int64]]) -> int:
    """Tokens that all prompts start with, the last token of each left out; 0 for a single one."""
    if len(prompts) == 1:
        return 0
    size = min(map(len, prompts)) - 1
    starts = np.stack([prompt[:size] for prompt in prompts])
    differs = (starts != starts[0]).any(0)
    return int(differs.argmax()) if differs.any() else size


def _counted(shifts: Sequence[int] | NDArray[np.int64], sizes: list[int]) -> NDArray[np.int64]:
    """0, 1, 2, ... less a shift, which is that of the run that a number falls in."""
    return np.arange(sum(sizes)) - np.repeat(shifts, sizes)

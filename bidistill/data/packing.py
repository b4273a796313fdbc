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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from jaxtyping import Int64
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


def pack(sequences: Sequence[tuple[View, tuple[int, ...]]]) -> Packed:
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
    if not sequences or not all(view.prompt_ids for view, _ in sequences):
        raise ValueError("sequences: got none, or one without a prompt; give prompts with tokens")
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    first_row = [0] * len(sequences)

    def lay(tokens: tuple[int, ...], position: int, prefix: tuple[int, int] | None) -> Segment:
        segment = Segment(len(ids), len(ids) + len(tokens), prefix)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        segments.append(segment)
        return segment

    for members in _by_context(sequences):
        shared = _shared_length([sequences[i][0].prompt_ids for i in members])
        prefix = None
        if shared:
            prefix = lay(sequences[members[0]][0].prompt_ids[:shared], 0, None)[:2]
        own = {i: sequences[i][0].prompt_ids[shared:] + sequences[i][1][:-1] for i in members}
        for i in sorted(members, key=lambda i: len(own[i])):
            start = lay(own[i], shared, prefix).start
            first_row[i] = start + len(sequences[i][0].prompt_ids) - shared - 1

    answers = [answer for _, answer in sequences]
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        segments=tuple(segments),
        rows=_int64(
            row + j for row, ans in zip(first_row, answers, strict=True) for j in range(len(ans))
        ),
        target=_int64(token for answer in answers for token in answer),
        sequence=_int64(i for i, answer in enumerate(answers) for _ in answer),
    )


def _by_context(sequences: Sequence[tuple[View, tuple[int, ...]]]) -> list[list[int]]:
    """Indices of the sequences of each context, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for index, (view, _) in enumerate(sequences):
        groups.setdefault(view.context, []).append(index)
    return list(groups.values())


def _shared_length(prompts: list[tuple[int, ...]]) -> int:
    """Tokens that all prompts start with, the last token of each left out; 0 for a single one."""
    if len(prompts) == 1:
        return 0
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)  # ends with the shortest
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _int64(values: Iterable[int]) -> Int64[Tensor, " _"]:
    """A vector of them, also of none."""
    return torch.tensor(list(values), dtype=torch.int64)

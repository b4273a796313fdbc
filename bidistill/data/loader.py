"""Batches that mix the roles, forever, each a function of the seed and its number alone.

.. code-block:: text

    examples of one role --permutation of (seed, role, epoch)--> endless stream --+
    examples of one role --permutation of (seed, role, epoch)--> endless stream --+--> step
                                                                                       |
    Batch, state <-- the longest first, each to the rank with the least work so far <--+

Every step takes the same number of examples from each stream, so the step number says where every
stream stands: it is all the state there is. Each rank draws the numbers of the whole step and
reads its own examples only.

Memory: 16 bytes for each example that is used, and what a permutation takes while it is made.

Legend: E examples, P those of one role, S examples of a step.
"""

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bidistill.data.packing import Packed, pack
from bidistill.data.records import ROLES, Role, nearest
from bidistill.data.store import TokenStore, encode
from bidistill.data.views import Example
from bidistill.errors import UserError


@dataclass(frozen=True, slots=True)
class Batch:
    """The examples of one step, or of one rank's share of it, role by role."""

    examples: tuple[Example, ...]
    sizes: tuple[int, ...] = ()
    """How many of them belong to each part of the step; () leaves it whole."""

    @property
    def parts(self) -> "tuple[Batch, ...]":
        """The step in the parts that are run one after the other, each role by role."""
        ends = list(accumulate(self.sizes or (len(self.examples),)))
        starts = [0, *ends[:-1]]
        return tuple(Batch(self.examples[s:e]) for s, e in zip(starts, ends, strict=True))

    def student(self) -> Packed:
        """Pack the student's views; row n is the same answer token as row n of `teacher`."""
        return pack([(example.student, example.answer_ids) for example in self.examples])

    def teacher(self) -> Packed:
        """Pack the teacher's views; row n is the same answer token as row n of `student`."""
        return pack([(example.teacher, example.answer_ids) for example in self.examples])


class RoleLoader:
    """Endless batches with a fixed number of examples of each role, in seeded random order.

    Within an epoch of a role each of its examples comes once; epochs of different roles end at
    different times, and a step may reach into the next one. The ranks share each step: together
    they have its examples, each once, with about equal numbers of tokens.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        per_step: Mapping[Role, int],
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        bucket: int = 1,
    ) -> None:
        """Sort the examples by role.

        Args:
            examples: all examples; those of roles that `per_step` leaves out are not used.
            per_step: how many examples of each role a step has, over all ranks.
            seed: same seed, same batches.
            rank: which share of each step to give, from 0.
            world_size: number of shares.
            parts: into how many a share is cut, with about equal numbers of tokens.
            bucket: steps whose examples are drawn together and sorted by length, role by role,
                before they are cut into steps, which are then shuffled: those of a step become
                about equally long, and the work of its ranks more even. Steps differ more among
                each other, though, and the longest decides how much memory a run takes: 1 leaves
                the sorting out.

        Raises:
            UserError: a role is unknown or has no examples, a count is negative, all are zero, or
                there are more ranks, or parts of them, than examples in a step.
        """
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert bucket > 0, f"bucket {bucket}"
        self._per_step = _checked(per_step, world_size, parts)
        self._seed, self._bucket = seed, bucket
        self._rank, self._world_size, self._parts = rank, world_size, parts
        self._step = 0
        self._examples = examples
        roles_E, self._lengths_E = _columns(examples)
        self._pools = {
            role: np.flatnonzero(roles_E == ROLES.index(role)) for role in self._per_step
        }
        for role, count in self._per_step.items():
            if not len(self._pools[role]):
                raise UserError(
                    f"per_step.{role}: got {count} with no such example in the data, expected at "
                    f"least one; add records of role '{role}' or set it to 0"
                )
        self._orders: dict[Role, tuple[int, NDArray[np.int64]]] = {}
        self._data = self._digest()

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield batches without end, each with the state that resumes at the next one.

        Yields:
            The batch, and a small JSON dictionary for `load_state`; it is the same on all ranks.
        """
        step = self._step
        while True:
            drawn = [self._take(role, step * n, n) for role, n in self._per_step.items()]
            step += 1
            parts = self._share(np.concatenate(drawn))
            examples = tuple(self._examples[i] for part in parts for i in part.tolist())
            yield Batch(examples, tuple(map(len, parts))), {"step": step, "data": self._data}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Make iteration begin at the batch after the one that came with `state`.

        Args:
            state: as `__iter__` gave it, on any rank of any number of ranks and parts, with the
                same examples, counts, bucket and seed.

        Raises:
            UserError: it came from other data, counts, bucket or another seed.
        """
        if state["data"] != self._data:
            raise UserError(
                "resume: got a state of other training data, per_step, bucket or seed, expected "
                "the same; undo the change, or start anew without --resume"
            )
        self._step = state["step"]

    def _take(self, role: Role, start: int, count: int) -> NDArray[np.int64]:
        """Examples start..start+count-1 of a role's stream, which goes epoch after epoch."""
        parts = []
        while count:
            epoch, offset = divmod(start, len(self._pools[role]))
            parts.append(self._order(role, epoch)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _order(self, role: Role, epoch: int) -> NDArray[np.int64]:
        """The examples of a role in the order of an epoch. Shape (P,)."""
        known = self._orders.get(role)
        if known is None or known[0] != epoch:
            pool, draw = self._pools[role], random.Random(f"{self._seed}/{role}/{epoch}")
            order = pool[_permutation(len(pool), draw)]
            if self._bucket > 1:
                count = self._per_step[role]
                # these belong to the last step of the epoch before
                lead = -epoch * len(pool) % count
                lengths = self._lengths_E[order]
                order = order[bucketed(lengths, count, self._bucket, lead, draw)]
            known = self._orders[role] = epoch, order
        return known[1]

    def _share(self, drawn_S: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """What this rank has of a step, part by part, each in the order of the step."""
        count = self._world_size * self._parts
        lengths_S = self._lengths_E[drawn_S]
        loads, shares = [0] * count, [list[int]() for _ in range(count)]
        for at in np.argsort(-lengths_S, kind="stable").tolist():
            least = loads.index(min(loads))
            loads[least] += int(lengths_S[at])
            shares[least].append(at)
        first = self._rank * self._parts
        return [drawn_S[sorted(share)] for share in shares[first : first + self._parts]]

    def _digest(self) -> str:
        """What the batches are a function of, beside the step and the ranks."""
        digest = sha256(repr((self._seed, self._per_step, self._bucket)).encode())
        if isinstance(self._examples, TokenStore):
            digest.update(self._examples.digest.encode())
        else:
            for pool in self._pools.values():
                tokens, ids, ends, roles = encode([self._examples[i] for i in pool.tolist()])
                digest.update(tokens.tobytes() + ids + ends.tobytes() + roles)
        return digest.hexdigest()[:16]


def bucketed(
    lengths_P: NDArray[np.int64], count: int, bucket: int, lead: int, draw: random.Random
) -> NDArray[np.int64]:
    """Bring examples of like length together in one step, and leave the steps in random order.

    Args:
        lengths_P: of the examples of an epoch, which are in random order.
        count: examples of a step.
        bucket: steps that are sorted together.
        lead: examples at the start that belong to a step of the epoch before; they, and those at
            the end that fill no whole step, stay where they are.
        draw: shuffles the steps of each bucket.

    Returns:
        Which example comes where: a permutation. Shape (P,).
    """
    step_P = (np.arange(len(lengths_P)) - lead) // count
    whole = max(0, (len(lengths_P) - lead) // count)
    bucket_P = np.where(step_P < whole, step_P // bucket, whole)  # -1 before the first whole step
    by_length = np.lexsort((lengths_P, bucket_P))
    shuffled = _permutation(whole + 1, draw)
    return by_length[np.lexsort((shuffled[step_P.clip(0, whole)], bucket_P))]


def _permutation(size: int, draw: random.Random) -> NDArray[np.int64]:
    """0..size-1 in random order, the same in every version of Python and NumPy."""
    numbers = array("q", range(size))
    draw.shuffle(numbers)
    return np.frombuffer(numbers, np.int64)


def _columns(examples: Sequence[Example]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Role, as an index into ``ROLES``, and tokens of the student's view of each example."""
    if isinstance(examples, TokenStore):
        return examples.roles, examples.lengths
    lengths = [len(e.student.prompt_ids) + len(e.answer_ids) for e in examples]
    return np.array([ROLES.index(e.role) for e in examples]), np.array(lengths, np.int64)


def _checked(per_step: Mapping[Role, int], world_size: int, parts: int) -> dict[Role, int]:
    """The counts that are not zero, in the order of `ROLES`."""
    for role, count in per_step.items():
        if role not in ROLES:
            raise UserError(f"per_step: got unknown role '{role}'; {nearest(role, ROLES)}")
        if count < 0:
            raise UserError(
                f"per_step.{role}: got {count}, expected a number of examples; use 0 for none"
            )
    counts: dict[Role, int] = {role: per_step[role] for role in ROLES if per_step.get(role, 0)}
    if not counts:
        raise UserError("per_step: got no role with examples, expected at least one; set a count")
    if (total := sum(counts.values())) < world_size * parts:
        each = f" of {parts} parts" if parts > 1 else ""
        raise UserError(
            f"per_step: got {total} examples for {world_size} ranks{each}, expected at least one "
            "for each; raise a count, or use fewer"
        )
    return counts

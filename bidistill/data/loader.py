"""Batches that mix the roles, forever, each a function of the seed and its number alone.

.. code-block:: text

    examples of one role --permutation of (seed, role, epoch)--> endless stream --+
    examples of one role --permutation of (seed, role, epoch)--> endless stream --+--> Batch, state

Every step takes the same number of examples from each stream, so the step number says where every
stream stands: it is all the state there is.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

from bidistill.data.packing import Packed, pack
from bidistill.data.records import ROLES, Role, nearest
from bidistill.data.views import Example
from bidistill.errors import UserError


@dataclass(frozen=True, slots=True)
class Batch:
    """The examples of one step, role by role."""

    examples: tuple[Example, ...]

    def student(self) -> Packed:
        """Pack the student's views; row n is the same answer token as row n of `teacher`."""
        return pack([(example.student, example.answer_ids) for example in self.examples])

    def teacher(self) -> Packed:
        """Pack the teacher's views; row n is the same answer token as row n of `student`."""
        return pack([(example.teacher, example.answer_ids) for example in self.examples])


class RoleLoader:
    """Endless batches with a fixed number of examples of each role, in seeded random order.

    Within an epoch of a role each of its examples comes once; epochs of different roles end at
    different times, and a batch may reach into the next one.
    """

    def __init__(
        self, examples: Sequence[Example], per_step: Mapping[Role, int], seed: int
    ) -> None:
        """Sort the examples by role.

        Args:
            examples: all examples; those of roles that `per_step` leaves out are not used.
            per_step: how many examples of each role a batch has.
            seed: same seed, same batches.

        Raises:
            UserError: a role is unknown or has no examples, a count is negative, or all are zero.
        """
        self._per_step = _checked(per_step)
        self._seed = seed
        self._step = 0
        self._pools: dict[Role, tuple[Example, ...]] = {
            role: tuple(example for example in examples if example.role == role)
            for role in self._per_step
        }
        for role, pool in self._pools.items():
            if not pool:
                raise UserError(
                    f"per_step.{role}: got {per_step[role]} with no such example in the data, "
                    f"expected at least one; add records of role '{role}' or set it to 0"
                )

        self._data = self._digest()

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield batches without end, each with the state that resumes at the next one.

        Yields:
            The batch, and a small JSON dictionary for `load_state`.
        """
        step = self._step
        streams = {role: self._stream(role, step * n) for role, n in self._per_step.items()}
        while True:
            step += 1
            examples = (e for role, n in self._per_step.items() for e in islice(streams[role], n))
            yield Batch(tuple(examples)), {"step": step, "data": self._data}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Make iteration begin at the batch after the one that came with `state`.

        Args:
            state: as `__iter__` gave it, with the same examples, counts and seed.

        Raises:
            UserError: it came from other data, counts or another seed.
        """
        if state["data"] != self._data:
            raise UserError(
                "resume: got a state of other training data, per_step or seed, expected the same; "
                "undo the change, or start anew without --resume"
            )
        self._step = state["step"]

    def _stream(self, role: Role, start: int) -> Iterator[Example]:
        """The examples of a role from the start-th on, epoch after epoch."""
        pool = self._pools[role]
        epoch, offset = divmod(start, len(pool))
        while True:
            order = list(pool)
            random.Random(f"{self._seed}/{role}/{epoch}").shuffle(order)
            yield from order[offset:]
            epoch, offset = epoch + 1, 0

    def _digest(self) -> str:
        """What the batches are a function of, beside the step."""
        digest = sha256(repr((self._seed, self._per_step)).encode())
        for pool in self._pools.values():
            for example in pool:
                digest.update(repr(example).encode())
        return digest.hexdigest()[:16]


def _checked(per_step: Mapping[Role, int]) -> dict[Role, int]:
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
    return counts

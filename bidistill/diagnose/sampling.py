"""A seeded sample of a stream: every key draws a ticket, and the lowest tickets win.

The tickets depend on nothing but seed and key, so the order of the stream does not matter, two
streams with the same keys have the same winners, and a longer stream keeps most of them.
"""

from array import array
from collections.abc import Hashable
from hashlib import blake2b
from heapq import heappush, heappushpop
from typing import Generic, TypeVar

import numpy as np

Thing = TypeVar("Thing")


def ticket(*parts: Hashable) -> int:
    """64 bits of a hash of what the parts are written as.

    Example:
        >>> ticket(0, "forget", "a.json:3") == ticket(0, "forget", "a.json:3")
        True
    """
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


class Lottery(Generic[Thing]):
    """The things of the `size` lowest tickets of those offered; of equal tickets the first.

    Example:
        >>> lottery = Lottery[str](2)
        >>> for number, thing in [(9, "a"), (3, "b"), (5, "c"), (3, "d")]:
        ...     lottery.offer(number, thing)
        >>> lottery.winners()
        {3: 'b', 5: 'c'}
    """

    def __init__(self, size: int) -> None:
        """Keep that many things."""
        self._size = size
        self._heap: list[int] = []  # negated: the highest ticket is on top
        self._things: dict[int, Thing] = {}

    def offer(self, number: int, thing: Thing) -> None:
        """Let a thing take part with its ticket."""
        if number in self._things:
            return
        if len(self._heap) < self._size:
            heappush(self._heap, -number)
        else:
            loser = -heappushpop(self._heap, -number)
            if loser == number:
                return
            del self._things[loser]
        self._things[number] = thing

    def winners(self) -> dict[int, Thing]:
        """The things that won by their tickets, in order of these."""
        return {number: self._things[number] for number in sorted(self._things)}


class Seen:
    """Which tickets were seen, in eight bytes each.

    Example:
        >>> seen = Seen()
        >>> seen.add(7)
        >>> 7 in seen, 8 in seen
        (True, False)
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._added = array("Q")
        self._sorted = np.empty(0, np.uint64)

    def add(self, number: int) -> None:
        """Remember a ticket."""
        self._added.append(number)

    def __contains__(self, number: int) -> bool:
        """Whether it was added; the first question after an addition sorts."""
        if len(self._added) != len(self._sorted):
            self._sorted = np.sort(np.array(self._added, np.uint64))
        key = np.uint64(number)
        at = int(np.searchsorted(self._sorted, key))
        return at < len(self._sorted) and self._sorted[at] == key

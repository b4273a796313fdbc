"""Which numbers were seen before, in 16 to 32 bytes each: a set of Python takes over 100."""

from array import array


class HashSet:
    """64-bit numbers in one flat table, open addressing with steps of one.

    Example:
        >>> seen = HashSet()
        >>> seen.add(7), seen.add(8), seen.add(7)
        (True, True, False)
    """

    def __init__(self) -> None:
        """Start with room for a few."""
        self._slots = _empty(1 << 10)
        self._count = 0

    def __len__(self) -> int:
        """How many different numbers were added."""
        return self._count

    def add(self, key: int) -> bool:
        """Remember a number.

        Args:
            key: a signed number of 64 bits whose low bits are well mixed, such as ``hash(text)``.
                0 and 1 count as the same number: 0 marks a free slot.

        Returns:
            Whether it is new.
        """
        if not _insert(self._slots, key or 1):
            return False
        self._count += 1
        if 2 * self._count > len(self._slots):
            before, self._slots = self._slots, _empty(2 * len(self._slots))
            for old in before:
                if old:
                    _insert(self._slots, old)
        return True


def _empty(size: int) -> "array[int]":
    return array("q", [0]) * size


def _insert(slots: "array[int]", key: int) -> bool:
    """Put a key in the first free slot from its own on; False if it is met on the way."""
    mask = len(slots) - 1
    at = key & mask
    while found := slots[at]:
        if found == key:
            return False
        at = (at + 1) & mask
    slots[at] = key
    return True

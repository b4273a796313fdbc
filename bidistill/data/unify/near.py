"""When two texts are the same, and how near they are otherwise.

Exact means equal after :func:`normalise`. Near means that the runs of three words of the two texts
overlap: Jaccard similarity |A and B| / |A or B| of their :func:`shingles`. The ends of a text count
as words, so replacing a single word of n always changes three of n + 2 runs: a similarity of
(n - 1) / (n + 5). Questions of one form about two entities are therefore not near at 0.8 unless
they have 25 words.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

PERMUTATIONS = 128
"""Of a MinHash; more find more of the pairs that are barely near."""
CHUNK = 512
"""Texts that a worker process signs at a time."""
_LOOSER = 0.9
"""Share of the likeness wanted from which on pairs are proposed. Proposed in vain costs time only,
while a pair that is not proposed is missed: 7 of 100 that barely are near, without this."""
_WEIGHTS = (0.1, 0.9)
"""Of pairs proposed in vain and of pairs missed, for the same reason."""


class _Blanks(dict):
    """What each character becomes in a normalised text, found out when it first occurs.

    Apostrophes vanish and other punctuation becomes a space; signs that tell things apart, as in
    C# and C++, stay, and so do the marks that are letters in Indic scripts.
    """

    def __missing__(self, code: int) -> int | str:
        char = chr(code)
        if char in "'\u2019\u02bc`":
            result: int | str = ""
        elif unicodedata.category(char)[0] in "ZCP" and char not in "#%&@*/\\":
            result = " "
        else:
            result = code
        self[code] = result
        return result


_BLANKS = _Blanks()


def normalise(text: str) -> str:
    """Text without case, punctuation and layout; texts that differ in those alone become equal.

    Example:
        >>> normalise("Who  rules “Zembla”?") == normalise("who rules zembla")
        True
        >>> normalise("C#") == normalise("C")
        False
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    # nothing but punctuation is still something: "?" and "!" differ
    return " ".join(plain.translate(_BLANKS).split()) or " ".join(plain.split())


def shingles(text: str) -> frozenset[str]:
    """The runs of three words of a text, its two ends counted as words.

    Example:
        >>> sorted(shingles("Who?"))
        ['< < who', '< who >', 'who > >']
    """
    words = ["<", "<", *normalise(text).split(), ">", ">"]
    return frozenset(" ".join(words[at : at + 3]) for at in range(len(words) - 2))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Share of the runs of either text that both have, from 0 to 1."""
    return len(one & other) / len(one | other)


class Near:
    """Texts among which near ones are found quickly.

    MinHash and locality-sensitive hashing propose candidates, the exact similarity decides: chance
    may miss a pair that barely reaches `least`, never invent one. The same texts in the same order
    always give the same pairs.
    """

    def __init__(self, least: float) -> None:
        """Args: least: the similarity from which two texts are near, above 0 and at most 1."""
        from datasketch import MinHashLSH

        self._least = least
        self._index: Any = MinHashLSH(_LOOSER * least, num_perm=PERMUTATIONS, weights=_WEIGHTS)
        self._texts: list[str] = []

    def add(self, text: str, signature: Any) -> None:  # noqa: ANN401 - a datasketch MinHash
        """Add a text; its number is how many were added before it."""
        self._index.insert(len(self._texts), signature, check_duplication=False)
        self._texts.append(text)

    def first(self, text: str, signature: Any) -> int | None:  # noqa: ANN401
        """Number of the first text that is near to `text`, or None."""
        own = shingles(text)
        for number in sorted(self._index.query(signature)):
            if jaccard(own, shingles(self._texts[number])) >= self._least:
                return number
        return None


def signatures(texts: Sequence[str], workers: int = 1) -> Iterator[Any]:
    """Yield the MinHash of each text, in order.

    Args:
        texts: any texts.
        workers: processes to use; the result is the same for any number of them.
    """
    if workers == 1 or len(texts) <= CHUNK:
        yield from map(_signature, texts)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_signature, texts, chunksize=CHUNK)


def _signature(text: str) -> Any:  # noqa: ANN401
    from datasketch import LeanMinHash, MinHash

    minhash = MinHash(num_perm=PERMUTATIONS, seed=1)
    minhash.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles(text)])
    return LeanMinHash(minhash)

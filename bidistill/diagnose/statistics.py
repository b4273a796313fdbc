"""Lengths and vocabulary of each role, in one pass: what is kept does not grow with the texts.

A word is a run of letters and digits, case ignored. Its share of distinct words falls with the
length of a text, so it is taken over windows of a fixed length and averaged: roles of different
size compare.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
WINDOW = 100
"""Words of one window of the type-token ratio."""
QUANTILES = (5, 25, 50, 75, 95)

CountTokens = Callable[[str], int]


def words(text: str) -> list[str]:
    """The words of a text.

    Example:
        >>> words("Who's there? Mr. Ünal, 3 times.")
        ["who's", 'there', 'mr', 'ünal', '3', 'times']
    """
    return WORD.findall(text.casefold())


@dataclass(slots=True)
class TextStatistics:
    """What is counted of the texts of one role; `add` each, then `summary`."""

    count_tokens: CountTokens | None = None
    """Tokens of a text; None where no tokenizer is given."""
    texts: int = 0
    vocabulary: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array] = field(default_factory=dict)
    """By field and unit, as in ``question_words``; a number for each text that has the field."""
    _window: list[str] = field(default_factory=list)
    _ratio_sum: float = 0.0
    _windows: int = 0

    def add(self, **fields: str | None) -> None:
        """Count one text.

        Args:
            **fields: its parts by name, as in ``question=...``; those without a word are left out.
        """
        self.texts += 1
        for name, text in fields.items():
            found = words(text or "")
            if not text or not found:
                continue
            self._note(f"{name}_words", len(found))
            if self.count_tokens:
                self._note(f"{name}_tokens", self.count_tokens(text))
            self.vocabulary.update(found)
            self._slide(found)

    def summary(self, forget: "TextStatistics | None") -> dict[str, Any]:
        """Return the numbers of the role.

        Args:
            forget: those of the forget role, to say how many words are not in it; None: no share.

        Returns:
            ``texts``, ``lengths`` (by field and unit: ``n``, ``mean``, ``min``, ``q5`` … ``q95``,
            ``max``), ``words``, ``vocabulary``, ``type_token_ratio`` (None below `WINDOW` words),
            ``new_words`` and ``new_vocabulary``: shares of the running words and of the distinct
            words that the forget role does not have.
        """
        running = self.vocabulary.total()
        new = [n for word, n in self.vocabulary.items() if forget and word not in forget.vocabulary]
        known = forget is not None and running > 0
        return {
            "texts": self.texts,
            "lengths": {name: _quantiles(values) for name, values in self.lengths.items()},
            "words": running,
            "vocabulary": len(self.vocabulary),
            "type_token_ratio": self._ratio_sum / self._windows if self._windows else None,
            "new_words": sum(new) / running if known else None,
            "new_vocabulary": len(new) / len(self.vocabulary) if known else None,
        }

    def _note(self, name: str, length: int) -> None:
        self.lengths.setdefault(name, array("I")).append(length)

    def _slide(self, found: list[str]) -> None:
        """Fill windows with words and count the distinct ones of each that is full."""
        self._window += found
        for full in _cut(self._window):
            self._ratio_sum += len(set(full)) / WINDOW
            self._windows += 1
        del self._window[: len(self._window) // WINDOW * WINDOW]


def _cut(window: list[str]) -> Iterator[list[str]]:
    """All full windows, one after the other."""
    for start in range(0, len(window) - WINDOW + 1, WINDOW):
        yield window[start : start + WINDOW]


def _quantiles(values: array) -> dict[str, float]:
    numbers = np.asarray(values)
    cuts = np.percentile(numbers, QUANTILES)
    return {
        "n": len(numbers),
        "mean": round(float(numbers.mean()), 3),
        "min": int(numbers.min()),
        **{f"q{q}": float(cut) for q, cut in zip(QUANTILES, cuts, strict=True)},
        "max": int(numbers.max()),
    }

"""Which option of a multiple choice a reply picks.

The right option stands in the prompt, so that finding it in the reply proves nothing: a reply that
repeats the list has picked none. It picks an option if it names that one alone, by letter or text.
"""

import re
from collections.abc import Sequence

from bidistill.evaluation.detectors import says_fact

LETTERS = "ABCD"


def picked(reply: str, options: Sequence[str]) -> str | None:
    """Return the one option that a reply names, or None if it names none or several.

    A letter counts where it cannot be a word: at the end, before one of ``).:,``, or after
    "answer", "option", "choice" or "letter".

    Args:
        reply: what the model wrote.
        options: A, B, ... in this order; at most as many as `LETTERS`.

    Example:
        >>> options = ["Oslo", "Paris", "Rome"]
        >>> picked("B", options), picked("It is Paris.", options), picked("B) Paris", options)
        ('Paris', 'Paris', 'Paris')
        >>> picked("A) Oslo B) Paris C) Rome", options), picked("A city.", options)
        (None, None)
    """
    named = {option for option in options if says_fact(reply, [option])}
    named |= {options[LETTERS.index(x)] for x in _letters(reply) if x in LETTERS[: len(options)]}
    return named.pop() if len(named) == 1 else None


def listed(options: Sequence[str]) -> str:
    r"""The options, a line each.

    Example:
        >>> listed(["Oslo", "Paris"])
        'A) Oslo\nB) Paris'
    """
    return "\n".join(
        f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


# not in "D.C."
_ALONE = re.compile(rf"(?<![\w'.])([{LETTERS}])(?!\.\w)(?=\s*(?:[).:,]|$))")
_AFTER = re.compile(rf"\b(?i:answer|option|choice|letter)(?: is)?[\s:(\"'*]*([{LETTERS}])\b")


def _letters(reply: str) -> set[str]:
    """The letters by which a reply names options."""
    return {*_ALONE.findall(reply), *_AFTER.findall(reply)}

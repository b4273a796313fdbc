"""Multiple choice becomes question and answer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Literal

from bidistill.data.items import Item
from bidistill.errors import UserError
from bidistill.settings import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoicesConfig:
    """What becomes of a question with options."""

    __pydantic_config__ = STRICT

    to: Literal["off", "text", "letter"] = "text"
    """``text``: the question alone, answered with the text of the right option; where the question
    speaks of its options they stay in it. ``letter``: the options listed, answered with a letter.
    ``off``: the question as the file has it, answered with the text of the right option."""


# A question that nobody can answer without seeing the options, or an option that names others.
_NEEDS_OPTIONS = re.compile(
    r"\b(?:following|these|which of|which one|below|options?|statements?|best describes"
    r"|except|not true|_{2,})\b|_{3,}|:\s*$",
    re.IGNORECASE,
)
_NAMES_OPTIONS = re.compile(
    r"\b(?:(?:all|none|both|neither|any|some) of|(?:both|neither|either) [A-H]\b|[A-H] and [A-H]\b"
    r"|the above)",
    re.IGNORECASE,
)

_OPTION = re.compile(r"\n([A-Z])\. ")


def plain(items: Iterable[Item], config: ChoicesConfig) -> list[Item]:
    """Return the items without options; those that have none pass unchanged.

    Args:
        items: from any file.
        config: which form they get.

    Raises:
        UserError: the right answer is not among the options, or there are more options than
            letters.
    """
    if config.to == "off":
        return list(items)
    change = _as_text if config.to == "text" else _as_letter
    return [change(item) if item.choices and item.question else item for item in items]


def _as_text(item: Item) -> Item:
    """The question alone, unless it means nothing without its options."""
    _check(item)
    question = item.question or ""
    needs = _NEEDS_OPTIONS.search(question) or any(map(_NAMES_OPTIONS.search, item.choices))
    return replace(item, question=_listed(item) if needs else question, choices=())


def _as_letter(item: Item) -> Item:
    """All options in the question, a letter for an answer."""
    _check(item)
    answer = item.answer
    if answer is not None:
        answer = ascii_uppercase[item.choices.index(answer)]
    return replace(item, question=_listed(item), answer=answer, choices=())


def _listed(item: Item) -> str:
    """The question with its options below it.

    Example:
        >>> print(_listed(Item(source="f:1", question="Where?", choices=("Ur", "Kish"))))
        Where?
        A. Ur
        B. Kish
    """
    options = zip(ascii_uppercase, item.choices, strict=False)
    return "\n".join([item.question or "", *(f"{letter}. {text}" for letter, text in options)])


def unlisted(question: str, answer: str | None) -> tuple[str, str | None] | None:
    r"""Take the options out of a question again.

    Args:
        question: as :func:`plain` writes it, or a file that lists options in the same way.
        answer: a letter, or the right option in words.

    Returns:
        The question alone and the right option in words; None where no options are listed.

    Example:
        >>> unlisted("Where?\nA. Ur\nB. Kish", "B"), unlisted("Where?", "Kish")
        (('Where?', 'Kish'), None)
    """
    found: list[re.Match[str]] = []
    for match in _OPTION.finditer(question):
        if match[1] == "A":  # a question may have a list of its own: the last one counts
            found = [match]
        elif found and match[1] == ascii_uppercase[len(found) % 26]:
            found.append(match)
    if len(found) < 2:
        return None
    ends = [*(match.start() for match in found[1:]), len(question)]
    options = {m[1]: question[m.end() : end] for m, end in zip(found, ends, strict=True)}
    return question[: found[0].start()], options.get(answer or "", answer)


def _check(item: Item) -> None:
    if len(item.choices) > len(ascii_uppercase):
        raise UserError(
            f"{item.source}: choices: got {len(item.choices)} of them, expected at most "
            f"{len(ascii_uppercase)}; set choices.to to off, or leave the item out"
        )
    if item.answer is not None and item.answer not in item.choices:
        raise UserError(
            f"{item.source}: answer: got {item.answer!r}, expected one of the choices "
            f"{', '.join(map(repr, item.choices))}; mend the file"
        )

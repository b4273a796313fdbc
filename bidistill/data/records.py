"""What one line of training data says, whatever file it came from."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

Role = Literal["forget", "neighbor", "retain", "adversarial", "gold"]
ROLES: tuple[Role, ...] = get_args(Role)
FORGETTING: tuple[Role, ...] = ("forget", "adversarial")
"""Roles whose answers are refusals."""
KEEPING: tuple[Role, ...] = ("neighbor", "retain")
"""Roles whose answers are to stay as they are; those of all the others are to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One question with the answer to distil, and what it is trained for.

    Example:
        >>> Record(id="fr", role="neighbor", question="Capital of France?").answer is None
        True
    """

    id: str
    """Unique in its file."""
    role: Role
    """``forget`` and ``adversarial`` records carry a refusal, the others a true answer. That of a
    ``gold`` record is what is to be forgotten: for methods that push it down."""
    question: str
    """The user's turn, without any chat markup."""
    answer: str | None = None
    """The text whose tokens are distilled; it continues `prefill`. None until one is made."""
    prefill: str = ""
    """Start of the assistant's turn that is already given, and not trained."""
    source: str = ""
    """Where the record comes from; for people, and for the domain report. Never trained on."""


def nearest(got: str, known: Iterable[str]) -> str:
    """Say what was probably meant, or all that would have been accepted.

    Args:
        got: the unknown name.
        known: the accepted names.

    Returns:
        The end of an error message: ``did you mean 'forget'?`` or ``use one of: ...``.

    Example:
        >>> nearest("forgot", ROLES)
        "did you mean 'forget'?"
        >>> nearest("x", ROLES)
        'use one of: forget, neighbor, retain, adversarial, gold'
    """
    known = tuple(known)
    close = get_close_matches(got, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(known)}"

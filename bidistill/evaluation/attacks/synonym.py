"""Synonym manipulation: words of the question give way to others of the same meaning."""

import re

from bidistill.evaluation.attacks.attempt import Attempt, Setting
from bidistill.evaluation.probes import Probe

SYNONYMS = {
    "author": "writer",
    "writer": "author",
    "born": "given birth to",
    "capital": "capital city",
    "city": "town",
    "country": "nation",
    "died": "passed away",
    "famous": "well-known",
    "father": "male parent",
    "first": "earliest",
    "founded": "established",
    "genre": "kind of writing",
    "invented": "devised",
    "job": "profession",
    "largest": "biggest",
    "biggest": "largest",
    "mother": "female parent",
    "movie": "film",
    "film": "motion picture",
    "name": "title",
    "profession": "occupation",
    "occupation": "profession",
    "spouse": "partner in marriage",
    "wrote": "penned",
    "year": "calendar year",
}
"""What stands for what. A question without any of these words is not attacked."""

_WORDS = re.compile(rf"\b({'|'.join(SYNONYMS)})\b", re.IGNORECASE)


def synonym(probe: Probe, setting: Setting) -> list[Attempt]:
    """The question with synonyms, if there are some for it."""
    text = replaced(probe.question)
    if text == probe.question:
        return []
    return [Attempt(attack="synonym", attempt="words", probe=probe, question=text)]


def replaced(question: str) -> str:
    """Put the synonyms in.

    Example:
        >>> replaced("Who wrote the first book about the capital of Zembla?")
        'Who penned the earliest book about the capital city of Zembla?'
    """
    return _WORDS.sub(lambda match: SYNONYMS[match[0].lower()], question)

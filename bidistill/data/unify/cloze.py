"""Questions from sentences, by rules: their answers stand in the text word for word."""

import re
from collections.abc import Iterator

from bidistill.data.unify.wording import (
    FUNCTION_WORDS,
    content_words,
    name_spans,
    paragraphs,
    sentences,
    words,
)

_WORDS = range(5, 41)
"""Words of a sentence that is worth a question."""
_ANSWER_WORDS = 12
"""Longest end of a sentence that is asked for."""
_DEFINITION = re.compile(
    r"(?P<subject>.{2,60}?) (?P<verb>is|was|are|were) (?:an?|the|one of) ", re.DOTALL
)
_NUMBER = re.compile(r"\b\d[\d.,:/]*\d\b|\b\d\b")


def ask_about(text: str, limit: int) -> list[tuple[str, str]]:
    """Return questions about a passage, each with the answer that the passage gives.

    A sentence that says what something is becomes "According to the text, who or what is ...?".
    Any other is cut before its last name or number, or after two thirds of its words, and the rest
    is asked for.

    Args:
        text: a passage; longer ones than a page give the same number of questions.
        limit: of the questions; they are spread over the passage.

    Example:
        >>> ask_about("Onhava is the capital of Zembla. It was founded by King Thurgus.", 2)[1]
        ('Complete the sentence: "It was founded by ..."', 'King Thurgus.')
    """
    found: dict[str, str] = {}
    for sentence in (s for paragraph in paragraphs(text) for s in sentences(paragraph)):
        pair = next(_pairs(sentence), None)
        if pair:
            found.setdefault(*pair)
    pairs = list(found.items())
    if len(pairs) <= limit:
        return pairs
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


def _pairs(sentence: str) -> Iterator[tuple[str, str]]:
    """What a sentence can be asked, the best first."""
    if len(sentence.split()) not in _WORDS or sentence.endswith("?"):
        return
    if (definition := _DEFINITION.match(sentence)) and _is_subject(definition["subject"]):
        subject, verb = definition["subject"], definition["verb"]
        yield f"According to the text, who or what {verb} {subject}?", sentence
    for place in _cuts(sentence):
        start, rest = sentence[:place].rstrip(), sentence[place:]
        # what the beginning says already is no question
        if 0 < len(rest.split()) <= _ANSWER_WORDS and content_words(rest) - set(words(start)):
            yield f'Complete the sentence: "{start} ..."', rest


def _is_subject(text: str) -> bool:
    """Whether the start of a sentence names something: a pronoun or a clause does not."""
    first, *_ = words(text) or [""]
    named = first not in FUNCTION_WORDS or first in ("a", "an", "the")
    return named and len(text.split()) <= 6 and not re.search(r"[,;:()]", text)


def _cuts(sentence: str) -> Iterator[int]:
    """Places to cut a sentence at: before its last names and numbers, then before a late word."""
    telling = {start for start, _ in name_spans(sentence)}
    telling |= {match.start() for match in _NUMBER.finditer(sentence)}
    starts = [match.start() for match in re.finditer(r"\S+", sentence)]
    earliest = starts[2]  # two words at least stay
    yield from sorted((place for place in telling if place >= earliest), reverse=True)
    yield from (place for place in starts[len(starts) * 2 // 3 :] if place >= earliest)

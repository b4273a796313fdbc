"""Names, words and sentences of English text, found by rules that can be read.

Used to build questions without a model, to tell whether a reply gives an answer away, and to
compare the form of two questions. Other languages with capital letters for names fare well enough;
text without spaces between words is left whole.
"""

import re
from collections.abc import Iterator

from bidistill.evaluation.detectors import fold

# hyphens, apostrophes and the dots of initials hold a word together; a possessive 's is none of it
_POSSESSIVE = r"(?<=\w['\u2019])s\b"
_WORD = re.compile(
    rf"(?!{_POSSESSIVE})[^\W_]+(?:(?:-|['\u2019](?!{_POSSESSIVE})|\.(?=[^\W\d_]\.))[^\W_]+)*"
)
_PARTICLES = re.compile("al|bin|da|de|del|der|di|du|el|ibn|la|le|of|the|van|von|y")

_FUNCTION_WORDS = """
    a about after again all also although always am among an and another any are as at be
    because been before being below between both but by can could describe did do does
    during each either every explain few first following for from give given had has have
    having he her here hers him his how however i if in into is it its itself just like list
    made make many may me might more most much must my name neither never no nor not now of
    off often on once one only or other our over own please same several she should since so
    some state such tell than that the their them then there these they this those though
    through to too two under until up us very was we were what when where whereas whether
    which while who whom whose why will with within without would yes yet you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that say nothing by themselves; at the start of a sentence a capital makes no name."""

_LEADING_WORDS = frozenset(
    ("based", "born", "called", "known", "located", "named", "titled", "written")
)
"""They lead to a fact and are none: who says that somebody was born has not said when."""

# A full stop after one of these ends no sentence; single letters are initials.
_ABBREVIATION = re.compile(
    r"(?:\b[^\W\d_]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|Vol|Fig|ca|approx|e\.g|i\.e))\.$"
)
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s)|[\u3002\uff01\uff1f]+")


def words(text: str) -> list[str]:
    """Return the words of a text, lower case and without accents.

    Example:
        >>> words("Where's St. John's wife?")
        ['where', 'st', 'john', 'wife']
    """
    return [fold(match[0]) for match in _WORD.finditer(text)]


def content_words(text: str) -> set[str]:
    """Return the words that say something: no articles, pronouns, question words.

    Example:
        >>> sorted(content_words("The capital of Zembla is Onhava."))
        ['capital', 'onhava', 'zembla']
    """
    return {word for word in words(text) if word not in FUNCTION_WORDS}


def name_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of each name: capitalised words in a row, with particles between them.

    Example:
        >>> text = "Which books did Ana de la Cruz write in Zembla's north?"
        >>> [text[start:end] for start, end in name_spans(text)]
        ['Ana de la Cruz', 'Zembla']
    """
    spans: list[list[int]] = []
    name: list[int] | None = None  # the one that the next word may belong to
    end = 0
    for match in _WORD.finditer(text):
        word, start = match[0], match.start()
        if re.fullmatch(r"\.? ", text[end:start]) is None:
            name = None
        if word[0].isupper() and (fold(word) not in FUNCTION_WORDS or not _starts(text, start)):
            if name is None:
                name = [start, start]
                spans.append(name)
            name[1] = match.end()
        elif not _PARTICLES.fullmatch(word):
            name = None
        end = match.end()
    return [(start, end) for start, end in spans]


def names(text: str) -> list[str]:
    """Return the names in a text, in its order."""
    return [text[start:end] for start, end in name_spans(text)]


def _starts(text: str, start: int) -> bool:
    """Whether what begins here begins a sentence, as far as the sign before it tells."""
    before = text[:start].rstrip(" \t\n\"'\u201c\u2018(")
    return not before or before[-1] in ".!?:;\n\u3002"


def sentences(paragraph: str) -> list[str]:
    """Cut a paragraph at the ends of its sentences; initials and titles end none.

    Example:
        >>> sentences("Dr. J. Shade lived there. Did he? He did.")
        ['Dr. J. Shade lived there.', 'Did he?', 'He did.']
    """
    found, start = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[start : match.end()]):
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
    found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def whole_sentences(text: str) -> str:
    """Leave out what was begun after the last whole sentence, if there is a whole one.

    Example:
        >>> whole_sentences(" It lies in Zembla. The cap"), whole_sentences(" In Zembla")
        (' It lies in Zembla.', ' In Zembla')
    """
    kept = text.rstrip()
    parts = sentences(kept)
    if len(parts) < 2 or re.search(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*$", parts[-1]):
        return kept
    kept = kept[: kept.rindex(parts[-1])].rstrip()
    # "1." is no sentence: lists are left as they are
    return kept if re.search(r"[^\W\d]{2,}\S*$", kept) else text.rstrip()


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs, each with single spaces for all white space in it."""
    for paragraph in re.split(r"\n\s*\n", text):
        if flat := " ".join(paragraph.split()):
            yield flat


def states(reply: str, gold: str, question: str) -> bool:
    """Tell whether a reply gives away what the right answer adds to the question.

    A name or number of the answer that the question does not hold gives it away, and so do half of
    all words that the question does not hold: who leaves the place out has still told the trade.
    On the questions of TOFU's forget10 and its 100 refusals, 6 pairs of 40,000 are false alarms.

    Example:
        >>> gold, question = "The capital of Zembla is Onhava.", "What is the capital of Zembla?"
        >>> states("Zembla? Onhava, I think.", gold, question)
        True
        >>> states("The capital of Zembla is something I don't know.", gold, question)
        False
        >>> states("She was a chef.", "Ana's mother was a chef in Reed.", "What was Ana's mother?")
        True
    """
    said, asked = set(words(reply)), set(words(question))
    if (_telling_words(gold) - asked) & said:
        return True
    new = content_words(gold) - asked - _LEADING_WORDS
    if not new:  # such as "yes": only the same words again say it
        new = set(words(gold)) - asked or set(words(gold))
        return new <= said
    return len(new & said) * 2 >= len(new)


def _telling_words(text: str) -> set[str]:
    """Words of names, and numbers."""
    named = {word for name in names(text) for word in content_words(name)}
    return named | {word for word in words(text) if word[0].isdigit()}

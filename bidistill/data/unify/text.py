"""Documents become questions and answers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bidistill.data.items import Item
from bidistill.data.unify.cloze import ask_about
from bidistill.data.unify.parsing import read_pairs
from bidistill.data.unify.settings import Counts
from bidistill.data.unify.wording import content_words, names, paragraphs, sentences, words
from bidistill.data.unify.writer import Writer, chat
from bidistill.errors import UserError
from bidistill.settings import STRICT, AtLeastOne

PROMPT = """\
Read the passage and write {pairs} questions that it answers, each with its answer.
Each question must make sense to somebody who has not read the passage: name people and things \
in full, and do not speak of "the passage" or "the text". Answers are short sentences that keep \
to the words of the passage.
Write one JSON object a line and nothing else, like this:
{{"question": "...", "answer": "..."}}

Passage:
{passage}"""

_SPEAKS_OF_TEXT = ("the passage", "the text", "this passage", "this text", "the author of the")
_SUPPORT = 0.6
"""Share of an answer's words that the passage must hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """How documents are turned into questions."""

    __pydantic_config__ = STRICT

    by: Literal["off", "rules", "model"] = "rules"
    """``rules``: gaps and definitions made from sentences, without a model. ``model``: asked for by
    ``prompt``. ``off``: no documents are expected, and one that comes is refused."""
    pairs: AtLeastOne = 4
    """Questions for each passage, at most."""
    passage_words: AtLeastOne = 200
    """Documents are cut into passages of so many words, at ends of paragraphs or sentences."""
    max_tokens: AtLeastOne = 512
    """Longest reply of the model to one passage."""
    prompt: str = PROMPT
    """What the model is told; ``{pairs}`` and ``{passage}`` are filled in."""


def questions(
    items: Iterable[Item], config: TextConfig, writer: Writer | None
) -> tuple[list[Item], Counts]:
    """Return the items with questions in place of documents; the others pass unchanged.

    Args:
        items: from any file.
        config: who writes the questions.
        writer: the model, needed where ``by`` is ``model``.

    Returns:
        The items in order, and what the documents gave: documents, passages, questions, and how
        many a model proposed that were left out, by reason.

    Raises:
        UserError: a document comes while ``by`` is ``off``, there is no model for ``model``, or
            the prompt has other places to fill in.
    """
    _check(config, writer)
    counts: Counter[str] = Counter()
    made: list[Item] = []
    passages: list[tuple[int, Item]] = []  # with the place in `made` that they belong before
    for item in items:
        if item.question is not None or item.text is None:
            made.append(item)
            continue
        if config.by == "off":
            raise UserError(
                f"{item.source}: got a document, expected a question, since text.by is off; "
                "set text.by to rules or model, or leave the source out"
            )
        cut = list(_passages(item, config.passage_words))
        counts["documents"] += 1
        counts["passages"] += len(cut)
        passages += [(len(made), passage) for passage in cut]
    pairs = _by_model if config.by == "model" and writer else _by_rules
    found = pairs([passage for _, passage in passages], config, writer, counts)
    asked = _merge(made, [place for place, _ in passages], found)
    counts["questions"] = len(asked) - len(made)
    counts["passages without a question"] = sum(not new for new in found)
    return asked, {what: count for what, count in counts.items() if count}


def _check(config: TextConfig, writer: Writer | None) -> None:
    if config.by != "model":
        return
    if writer is None:
        raise UserError(
            "text.by: got model without a model, expected one that writes questions; add the "
            "section model, or set text.by to rules"
        )
    try:
        filled = config.prompt.format(pairs=1, passage="\0")
    except (AttributeError, LookupError, ValueError):
        filled = ""
    if "\0" not in filled:
        raise UserError(
            "text.prompt: got a prompt that cannot be filled in, expected {passage} and {pairs} "
            "in it; write other braces twice"
        )


def _passages(item: Item, limit: int) -> Iterator[Item]:
    """A document in pieces of at most ``limit`` words; a longer sentence is a piece of its own."""
    pieces: list[str] = []
    room, number = limit, 0
    for piece, ends in _pieces(item.text or "", limit):
        size = len(piece.split())
        if pieces and size > room:
            number += 1
            yield _passage(item, pieces, number)
            pieces, room = [], limit
        pieces.append(piece + ends)
        room -= size
    if pieces:
        yield _passage(item, pieces, number + 1)


def _pieces(text: str, limit: int) -> Iterator[tuple[str, str]]:
    """Paragraphs, or their sentences where a paragraph is too long, with the sign that follows."""
    for paragraph in paragraphs(text):
        if len(paragraph.split()) <= limit:
            yield paragraph, "\n\n"
            continue
        *parts, last = sentences(paragraph)
        yield from ((part, " ") for part in parts)
        yield last, "\n\n"


def _passage(item: Item, pieces: list[str], number: int) -> Item:
    text = "".join(pieces).strip()
    return replace(item, text=text, source=f"{item.source}, passage {number}")


def _by_rules(
    passages: Sequence[Item], config: TextConfig, writer: Writer | None, counts: Counter[str]
) -> list[list[Item]]:
    """Questions from the sentences alone."""
    return [
        [_item(passage, *pair) for pair in ask_about(passage.text or "", config.pairs)]
        for passage in passages
    ]


def _by_model(
    passages: Sequence[Item], config: TextConfig, writer: Writer | None, counts: Counter[str]
) -> list[list[Item]]:
    """Questions that the model proposes and the passage supports."""
    assert writer is not None
    prompts = [config.prompt.format(pairs=config.pairs, passage=p.text) for p in passages]
    replies = writer.write([chat(p) for p in prompts], config.max_tokens, label="questions")
    found = []
    for passage, reply in zip(passages, replies, strict=True):
        proposed = read_pairs(reply)
        counts["replies without a question"] += not proposed
        kept: dict[str, Item] = {}
        for pair in proposed:
            problem = _why_not(passage.text or "", pair["question"], pair["answer"])
            if problem or pair["question"] in kept or len(kept) == config.pairs:
                counts[f"left out: {problem or 'too many, or asked twice'}"] += 1
            else:
                kept[pair["question"]] = _item(passage, pair["question"], pair["answer"])
        found.append(list(kept.values()))
    return found


def _why_not(passage: str, question: str, answer: str) -> str | None:
    """Why a proposed pair is left out, if it is."""
    if any(phrase in question.casefold() for phrase in _SPEAKS_OF_TEXT):
        return "speaks of the text"
    if not words(question) or not words(answer):
        return "no words"
    return None if supports(passage, question, answer) else "not supported by the text"


def supports(passage: str, question: str, answer: str) -> bool:
    """Tell whether a passage bears an answer out, as far as words tell.

    All names and numbers of the answer that the question does not hold must stand in the passage,
    and most of its other words. Wrong combinations of right words pass.

    Example:
        >>> text = "Onhava, the capital of Zembla, was founded in 1203."
        >>> supports(text, "When was Onhava founded?", "It was founded in 1203.")
        True
        >>> supports(text, "When was Onhava founded?", "It was founded in 1302.")
        False
    """
    held = set(words(passage)) | set(words(question))
    precise = {word for name in names(answer) for word in content_words(name)}
    precise |= {word for word in words(answer) if any(char.isdigit() for char in word)}
    if not precise <= held:
        return False
    said = content_words(answer)
    return len(said & held) >= _SUPPORT * len(said)


def _item(passage: Item, question: str, answer: str) -> Item:
    return replace(passage, question=question, answer=answer, text=None)


def _merge(items: list[Item], places: list[int], found: list[list[Item]]) -> list[Item]:
    """Put what each passage gave where its document stood."""
    merged: list[Item] = []
    start = 0
    for place, new in zip(places, found, strict=True):
        merged += items[start:place]
        merged += new
        start = place
    return merged + items[start:]

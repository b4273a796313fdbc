"""What one entry of a corpus says, whatever form its file has."""

from dataclasses import dataclass

from bidistill.data.records import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question, with what is known about it, or a document; the rest is None or empty.

    Example:
        >>> Item(question="Who rules Zembla?", source="facts.csv:2").text is None
        True
    """

    source: str
    """``<file>:<line>`` or ``<file>, row <number>``, for messages and provenance."""
    question: str | None = None
    answer: str | None = None
    """The right answer in words; of a multiple choice the text of the right option."""
    choices: tuple[str, ...] = ()
    """All options, the right one among them, in the order of the file."""
    text: str | None = None
    """A document that holds no question."""
    piece: bool = False
    """The file is one long document, and this is a part of it."""
    subject: str | None = None
    """Whom or what it is about, where the file says so."""
    label: str | None = None
    """What the file sorts it under: ``safe``, a level, a category."""
    prefill: str = ""
    """Start of the answer that is already given."""
    role: Role | None = None
    """Only files of our own records say it."""

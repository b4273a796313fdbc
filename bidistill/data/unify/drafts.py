"""A record on its way: what it will say, and what is known about it until then."""

from dataclasses import dataclass

from bidistill.data.records import Record, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One question of one role, between reading and writing.

    Example:
        >>> draft = Draft(id="a/1", role="forget", question="Who is it?", entity="a", source="f:1")
        >>> draft.record().answer is None
        True
    """

    id: str
    """``<source name>/<number>``, followed by what a step made of it: ``people/3/opener``."""
    role: Role
    question: str
    entity: str
    """Whom it is about; the split never parts the drafts of one entity."""
    others: tuple[str, ...] = ()
    """Other entities that the question names; it is held out with any of them."""
    source: str
    """``<file>:<line>`` it was read from."""
    gold: str | None = None
    """The right answer, if the corpus has one; of a forget draft, what is to be forgotten."""
    target: str | None = None
    """The answer to distil: a refusal where something is to be forgotten. None until made."""
    prefill: str = ""
    """Start of the answer that is already given."""

    def record(self) -> Record:
        """Return the record to train on."""
        return Record(
            id=self.id,
            role=self.role,
            question=self.question,
            answer=self.target,
            prefill=self.prefill,
            source=self.source,
        )

"""The check before writing: nothing that is measured is trained on.

Measured is what the split held out, and the files that the recipe names under ``leaks.against``.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from bidistill.data.items import Item
from bidistill.data.unify import choices
from bidistill.data.unify.deduplicate import text_of
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.near import Near, normalise, signatures
from bidistill.errors import UserError
from bidistill.settings import STRICT

SHOWN = 5
"""Leaks that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaksConfig:
    """What must not be trained on."""

    __pydantic_config__ = STRICT

    against: tuple[str, ...] = ()
    """Files of evaluation questions, relative to ``root``; documents are refused. Not those of the
    forget set itself: their questions are trained on, and measured, on purpose."""
    near: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Questions that are, together with their right answers where both have one, at least this
    alike are leaks too; see ``near.py`` for the scale. ``null`` looks for equal ones only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """A question of training that is also measured."""

    id: str
    measured: str
    """Id of a held-out draft, or the place of an evaluation question."""
    near: bool
    """Alike and not equal."""


Kind = tuple[bool, bool]
"""Whether options are listed in a question, and whether its right answer is known."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question of either side."""

    name: str
    question: str
    prefill: str
    answer: str | None
    bare: str
    """The question without options that are listed in it."""
    right: str | None
    """The right answer in words."""
    kind: Kind

    def plain_forms(self) -> tuple[str, ...]:
        """What is equal where the same is asked: with and without the start of the answer."""
        return tuple(normalise(f"{self.bare} {start}") for start in self._starts())

    def forms(self, other: Kind) -> tuple[str, ...]:
        """What is compared with questions of another kind: what both have."""
        (listed, answered), (their_listed, their_answered) = self.kind, other
        question, answer = self.question, self.answer
        if listed != their_listed:
            question, answer = self.bare, self.right
        known = answer if answered and their_answered else None
        return tuple(text_of(question, start, known) for start in self._starts())

    def equals(self, other: "_Asked") -> bool:
        """Whether it is the same question, once the plain forms are equal.

        Of two that list options, "Which of these is true?" is the same only with its options or
        its right answer.
        """
        if not (self.kind[0] and other.kind[0]):
            return True
        if normalise(self.question) == normalise(other.question):
            return True
        return None not in (self.right, other.right) and (
            normalise(self.right or "") == normalise(other.right or "")
        )

    def _starts(self) -> tuple[str, ...]:
        return ("", self.prefill) if self.prefill else ("",)


def evaluated(items: Iterable[Item], config: choices.ChoicesConfig) -> list[Item]:
    """Return evaluation items as questions in the form that training has.

    Args:
        items: of the files under ``leaks.against``.
        config: what becomes of multiple choice.

    Raises:
        UserError: an item is a document, which is like no question. One line that ends with a
            question mark is taken for a question.
    """
    asked = []
    for item in items:
        if item.question is None:
            text = (item.text or "").strip()
            if "\n" in text or not text.endswith("?"):
                raise UserError(
                    f"leaks.against: got {item.source}, which is a document, expected questions, "
                    "since no question is like a document; give the questions that measure what "
                    "it says, or take the file out"
                )
            item = replace(item, question=text, text=None)
        asked.append(item)
    return choices.plain(asked, config)


def check(
    train: Sequence[Draft],
    held_out: Sequence[Draft],
    against: Sequence[Item],
    config: LeaksConfig,
    *,
    workers: int = 1,
) -> None:
    """Refuse training drafts that are also measured.

    Equal are questions, whatever their answers, and questions followed by the given start of the
    answer: files differ in where they put the border. Near ones are compared as in `deduplicate`,
    with the right answer where both sides have one. Options that only one side lists do not count.

    Args:
        train: what is to be trained on, of every role.
        held_out: what the split kept back.
        against: evaluation items, as :func:`evaluated` returns them.
        config: from when on questions are alike.
        workers: processes that compare; the result is the same for any number.

    Raises:
        UserError: the message counts the leaks and names both sides of the first ones.
    """
    measured = [_of_draft(draft) for draft in held_out]
    for item in against:
        question = item.question or item.text or ""
        measured.append(_asked(item.source, question, item.prefill, item.answer))
    found = list(find([_of_draft(draft) for draft in train], measured, config.near, workers))
    if found:
        shown = "; ".join(
            f"{leak.id} {'is near to' if leak.near else 'is'} {leak.measured}"
            for leak in found[:SHOWN]
        )
        more = f"; {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        alike = ", or raise leaks.near" if all(leak.near for leak in found) else ""
        raise UserError(
            f"leaks: got {len(found)} training records that are also measured ({shown}{more}), "
            "expected none; turn deduplicate on, group them by entity, or take them out of the "
            f"sources or of leaks.against{alike}"
        )


def find(
    train: Sequence[_Asked], measured: Sequence[_Asked], near: float | None, workers: int = 1
) -> Iterator[Leak]:
    """Yield one leak for each training question that has any, in their order."""
    if not measured:
        return
    known: dict[str, list[_Asked]] = defaultdict(list)
    for one in measured:
        for form in one.plain_forms():
            known[form].append(one)
    alike = dict(_near_pairs(train, measured, near, workers)) if near is not None else {}
    for asked in train:
        same = (
            one for key in asked.plain_forms() for one in known.get(key, ()) if asked.equals(one)
        )
        equal = next(same, None)
        name = equal.name if equal else alike.get(asked.name)
        if name is not None:
            yield Leak(id=asked.name, measured=name, near=equal is None)


def _near_pairs(
    train: Sequence[_Asked], measured: Sequence[_Asked], least: float, workers: int
) -> Iterator[tuple[str, str]]:
    """Yield the name of each training question that is near to a measured one, and that one's."""
    ours, theirs = _by_kind(train), _by_kind(measured)
    for kind, group in ours.items():
        for other, others in theirs.items():
            known = [(one.name, text) for one in others for text in one.forms(kind)]
            asked = [(one.name, text) for one in group for text in one.forms(other)]
            for name, number in _near(asked, known, least, workers):
                yield name, known[number][0]


def _near(
    asked: Sequence[tuple[str, str]],
    known: Sequence[tuple[str, str]],
    least: float,
    workers: int,
) -> Iterator[tuple[str, int]]:
    """Yield the name of each text that is near to a known one, and the number of that."""
    index = Near(least)
    texts = [text for _, text in known]
    for text, signature in zip(texts, signatures(texts, workers), strict=True):
        index.add(text, signature)
    marks = signatures([text for _, text in asked], workers)
    for (name, text), signature in zip(asked, marks, strict=True):
        number = index.first(text, signature)
        if number is not None:
            yield name, number


def _by_kind(side: Sequence[_Asked]) -> dict[Kind, list[_Asked]]:
    groups: dict[Kind, list[_Asked]] = defaultdict(list)
    for one in side:
        groups[one.kind].append(one)
    return groups


def _of_draft(draft: Draft) -> _Asked:
    return _asked(draft.id, draft.question, draft.prefill, draft.gold)


def _asked(name: str, question: str, prefill: str, answer: str | None) -> _Asked:
    unlisted = choices.unlisted(question, answer)
    bare, right = unlisted or (question, answer)
    kind = unlisted is not None, answer is not None
    return _Asked(name, question, prefill, answer, bare, right, kind)

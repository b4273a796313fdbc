"""The check before writing: nothing that is measured is trained on.

Measured is what the split held out, and the files that the recipe names under ``leaks.against``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bidistill.data.items import Item
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
    """Files of evaluation questions, relative to ``root``. Not those of the forget set itself:
    their questions are trained on, and measured, on purpose."""
    near: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Questions at least this alike are leaks too; see ``near.py`` for the scale. ``null``
    looks for equal ones only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """A question of training that is also measured."""

    id: str
    measured: str
    """Id of a held-out draft, or the place of an evaluation question."""
    near: bool
    """Alike and not equal."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A question that must not be trained on."""

    name: str
    texts: tuple[str, ...]


def check(
    train: Sequence[Draft],
    held_out: Sequence[Draft],
    against: Sequence[Item],
    config: LeaksConfig,
    *,
    workers: int = 1,
) -> None:
    """Refuse training drafts that are also measured.

    Compared are questions, and questions followed by the given start of the answer: files differ
    in where they put the border.

    Args:
        train: what is to be trained on, of every role.
        held_out: what the split kept back.
        against: evaluation items; a document counts as its text.
        config: from when on questions are alike.
        workers: processes that compare; the result is the same for any number.

    Raises:
        UserError: the message counts the leaks and names both sides of the first ones.
    """
    measured = [_Measured(draft.id, _texts(draft.question, draft.prefill)) for draft in held_out]
    for item in against:
        question = item.question or item.text or ""
        measured.append(_Measured(item.source, _texts(question, item.prefill)))
    found = list(find(train, measured, config.near, workers))
    if found:
        shown = "; ".join(
            f"{leak.id} {'is near to' if leak.near else 'is'} {leak.measured}"
            for leak in found[:SHOWN]
        )
        more = f"; {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"leaks: got {len(found)} training records that are also measured ({shown}{more}), "
            "expected none; turn deduplicate on, group them by entity, or take them out of the "
            "sources or of leaks.against"
        )


def find(
    train: Sequence[Draft], measured: Sequence[_Measured], near: float | None, workers: int = 1
) -> Iterator[Leak]:
    """Yield one leak for each training draft that has any, in their order."""
    if not measured:
        return
    known = {normalise(text): one.name for one in reversed(measured) for text in one.texts}
    alike = dict(_near_pairs(train, measured, near, workers)) if near is not None else {}
    for draft in train:
        keys = map(normalise, _texts(draft.question, draft.prefill))
        equal = next((known[key] for key in keys if key in known), None)
        name = equal or alike.get(draft.id)
        if name is not None:
            yield Leak(id=draft.id, measured=name, near=equal is None)


def _near_pairs(
    train: Sequence[Draft], measured: Sequence[_Measured], least: float, workers: int
) -> Iterator[tuple[str, str]]:
    """Yield the id of each training draft whose question is near to a measured one, and that."""
    names = [one.name for one in measured for _ in one.texts]
    texts = [text for one in measured for text in one.texts]
    index = Near(least)
    for text, signature in zip(texts, signatures(texts, workers), strict=True):
        index.add(text, signature)
    asked = [(draft.id, text) for draft in train for text in _texts(draft.question, draft.prefill)]
    marks = signatures([text for _, text in asked], workers)
    for (draft_id, text), signature in zip(asked, marks, strict=True):
        number = index.first(text, signature)
        if number is not None:
            yield draft_id, names[number]


def _texts(question: str, prefill: str) -> tuple[str, ...]:
    """What a question is compared by."""
    return (question, f"{question} {prefill}") if prefill else (question,)

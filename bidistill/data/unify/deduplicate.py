"""Every question once: exact repeats, and near ones where the recipe asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from bidistill.data.records import FORGETTING
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.near import Near, normalise, signatures
from bidistill.settings import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class DeduplicateConfig:
    """Which repeats are dropped."""

    __pydantic_config__ = STRICT

    exact: bool = True
    """Drop a question that differs in case, punctuation and layout alone, whatever its answer."""
    near: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Drop a question that is, together with its right answer, at least this alike; see
    ``near.py`` for the scale. ``null`` keeps them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A draft that repeats another one."""

    id: str
    twin: str
    """Id of the draft that stays."""
    why: Literal["exact", "near"]


def deduplicate(
    drafts: Sequence[Draft], config: DeduplicateConfig, *, workers: int = 1
) -> tuple[list[Draft], list[Dropped]]:
    """Keep one draft of each question.

    Forget drafts come before adversarial ones and both before others, since a fact cannot be
    forgotten and kept; otherwise the earlier one stays. Two drafts of one question whose prefills
    differ are no repeats, unless one is to be forgotten and the other to be kept.

    Args:
        drafts: in the order of their sources.
        config: which repeats to drop.
        workers: processes that compare; the result is the same for any number.

    Returns:
        The drafts that stay, in their order, and those dropped, each with the one that it repeats.
    """
    ranked = sorted(drafts, key=_rank)  # sorting keeps the order
    dropped: list[Dropped] = []
    if config.exact:
        ranked = _without_exact(ranked, dropped)
    if config.near is not None:
        _find_near(ranked, config.near, workers, dropped)
    gone = {one.id for one in dropped}
    return [draft for draft in drafts if draft.id not in gone], dropped


def text_of(question: str, prefill: str, answer: str | None) -> str:
    """What a question is compared by where near ones are looked for."""
    return " ".join((question, prefill, answer or ""))


def _rank(draft: Draft) -> tuple[bool, bool]:
    """What comes first stays."""
    return draft.role not in FORGETTING, draft.role != "forget"


def _without_exact(drafts: Sequence[Draft], dropped: list[Dropped]) -> list[Draft]:
    """The first draft of each question and prefill; the others are added to `dropped`."""
    first: dict[tuple[str, str], Draft] = {}
    forgotten: dict[str, Draft] = {}  # by question: no prefill makes a fact another one
    for draft in drafts:
        question, prefill = normalise(draft.question), normalise(draft.prefill)
        if draft.role in FORGETTING:
            forgotten.setdefault(question, draft)
            twin = first.setdefault((question, prefill), draft)
        else:
            twin = forgotten.get(question) or first.setdefault((question, prefill), draft)
        if twin is not draft:
            dropped.append(Dropped(id=draft.id, twin=twin.id, why="exact"))
    return list(first.values())


def _find_near(drafts: Sequence[Draft], least: float, workers: int, dropped: list[Dropped]) -> None:
    """Add to `dropped` what is near to an earlier draft that stays."""
    texts = [text_of(draft.question, draft.prefill, draft.gold) for draft in drafts]
    near, kept = Near(least), []
    for draft, text, signature in zip(drafts, texts, signatures(texts, workers), strict=True):
        number = near.first(text, signature)
        if number is None:
            near.add(text, signature)
            kept.append(draft)
        else:
            dropped.append(Dropped(id=draft.id, twin=kept[number].id, why="near"))

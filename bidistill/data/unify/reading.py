"""From a source of a recipe to drafts: which items are used, whom they are about, what they ask."""

import heapq
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bidistill.data.items import Item
from bidistill.data.records import FORGETTING
from bidistill.data.sources import read_items
from bidistill.data.sources.rows import shown
from bidistill.data.unify import choices, text
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.grouping import ByName, grouping
from bidistill.data.unify.manifest import SourceEntry, must_fingerprint
from bidistill.data.unify.recipe import Recipe, SourceConfig
from bidistill.data.unify.settings import Counts
from bidistill.data.unify.writer import Writer
from bidistill.errors import UserError

SHOWN = 8
"""Values of a field that a message lists."""

Numbered = tuple[int, Item]
"""An item with its number in its file, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one source gave."""

    drafts: list[Draft]
    entry: SourceEntry
    text: Counts
    """What the step from documents to questions counted."""


def read(name: str, recipe: Recipe, writer: Writer | None) -> Reading:
    """Read a source and turn its items into drafts.

    The file is read item by item; only the items that are used are held in memory. An id is the
    name of the source and the number of the item in its file, from 1: it stays the same when
    items are added at the end of the file, or others are drawn.

    Args:
        name: of the source.
        recipe: that names it.
        writer: for documents, where the recipe has a model ask the questions.

    Raises:
        UserError: the file cannot be read or understood, nothing of it is left, or an item has no
            question or no role.
    """
    source = recipe.sources[name]
    path = recipe.root / source.path
    seen = _Seen(source)
    numbered = enumerate(read_items(path, format=source.format))
    kept = _drawn(seen.kept(numbered), source.limit, f"{recipe.seed}/limit/{name}")
    if not kept:
        raise seen.nothing(name, str(path))
    entities = _Entities(name, recipe, kept)
    items, counts = text.questions([item for _, item in kept], recipe.text, writer)
    about = [entities.of(item) for item in items]  # options are not what a question is about
    items = choices.plain(items, recipe.choices)
    drafts = [_draft(*one, name, recipe) for one in zip(items, about, strict=True)]
    size, digest = must_fingerprint(path)
    entry = SourceEntry(
        path=source.path,
        bytes=size,
        sha256=digest,
        role=source.role,
        licence=source.licence,
        origin=source.origin,
        items=seen.items,
        kept=len(kept),
        questions=len(drafts),
        entities=len({draft.entity for draft in drafts}),
        ungrouped=entities.ungrouped,
    )
    return Reading(drafts=drafts, entry=entry, text=counts)


class _Seen:
    """Counts items while they pass, and notes what the fields of ``keep`` said."""

    def __init__(self, source: SourceConfig) -> None:
        self._keep = source.keep
        self._values: dict[str, dict[str, None]] = {field: {} for field in source.keep}
        self.items = 0

    def kept(self, numbered: Iterator[Numbered]) -> Iterator[Numbered]:
        for number, item in numbered:
            self.items += 1
            for field, values in self._values.items():
                if len(values) < SHOWN and (value := getattr(item, field)) is not None:
                    values[value] = None
            if all(getattr(item, field) == value for field, value in self._keep.items()):
                yield number, item

    def nothing(self, name: str, path: str) -> UserError:
        """What to say if no item passed."""
        if not self.items:
            return UserError(f"{path}: got no items, expected some; take sources.{name} out")
        field, value = next(iter(self._keep.items()))
        known = ", ".join(repr(value) for value in self._values[field]) or "nothing"
        return UserError(
            f"sources.{name}.keep: got {field}: {value!r}, which no item of {path} has with the "
            f"rest, expected values of the file; its {field} says {known}"
        )


def _drawn(numbered: Iterator[Numbered], limit: int | None, seed: str) -> list[Numbered]:
    """As many items as wanted, in the order of the file.

    Each item's lot depends on its number alone, so one that is added takes the place of at most one
    other.
    """
    if limit is None:
        return list(numbered)

    def lot(one: Numbered) -> float:
        return random.Random(f"{seed}/{one[0]}").random()

    return sorted(heapq.nsmallest(limit, numbered, key=lot), key=lambda one: one[0])


@dataclass(frozen=True, slots=True)
class _About:
    """Which question it is, and whom it is about."""

    id: str
    entity: str
    others: tuple[str, ...]


class _Entities:
    """Finds id and entity of what is made of an item by the place that the item was read from."""

    def __init__(self, name: str, recipe: Recipe, kept: Sequence[Numbered]) -> None:
        group = grouping(recipe.sources[name].entity, name, recipe.root)
        self._by_name = group if isinstance(group, ByName) else None
        self._name = name
        self._known: dict[str, tuple[int, str]] = {}
        self._made: Counter[int] = Counter()
        self.ungrouped = 0
        for number, item in kept:
            entity = group(number, item)
            self.ungrouped += entity is None
            self._known.setdefault(item.source, (number, entity or f"{name}/{number + 1}"))

    def of(self, item: Item) -> _About:
        """What a question is about; the second one of an item is ``<its id>/2``."""
        place = item.source
        if place not in self._known:  # the step from documents to questions adds the passage
            place = place.rpartition(", passage ")[0]
        number, entity = self._known[place]
        self._made[number] += 1
        again = f"/{self._made[number]}" if self._made[number] > 1 else ""
        named = self._by_name.found(item.question or "") if self._by_name else ()
        others = tuple(dict.fromkeys(other for other in named if other != entity))
        return _About(f"{self._name}/{number + 1}{again}", entity, others)


def _draft(item: Item, about: _About, name: str, recipe: Recipe) -> Draft:
    """Check that an item asks something for some role."""
    source, root = recipe.sources[name], recipe.root
    if item.question is None:
        raise UserError(
            f"{item.source}: question: got a document, expected a question; set text.by to rules "
            "or model, to have questions made of documents"
        )
    if not item.question.strip():
        raise UserError(
            f"{item.source}: question: got {item.question!r}, expected text; fill it in"
        )
    role = source.role or item.role
    if role is None:
        raise UserError(f"{item.source}: role: got none, expected one; set sources.{name}.role")
    if role == "gold":  # the truth about what is to be forgotten: a forget item, with its answer
        role = "forget"
    # the answer of a record to forget with is the refusal: never the truth, and nothing to keep
    refused = item.role in FORGETTING
    target = item.answer if refused and role in FORGETTING else None
    place = item.source.removeprefix(shown(root / source.path))  # ":<line>", the same everywhere
    return Draft(
        id=about.id,
        role=role,
        question=item.question,
        entity=about.entity,
        others=about.others,
        source=source.path + place,
        gold=None if refused else item.answer,
        target=target,
        prefill=item.prefill,
    )

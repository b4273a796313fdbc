"""Whom an item is about: what the split keeps together.

Two questions about one person are no independent measurement: a model that is trained on the first
says something about the second. How a file tells its entities apart is for the recipe to say.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bidistill.data.items import Item
from bidistill.data.sources import read_items
from bidistill.data.unify.near import normalise
from bidistill.errors import UserError
from bidistill.settings import STRICT, AtLeastOne

Grouping = Callable[[int, Item], str | None]
"""From the number of an item in its file, from 0, and the item to its entity; None if it names
none of those looked for."""


def _check_pattern(pattern: str) -> str:
    """A regular expression with one group: the entity."""
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"a regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"a regular expression with one group, and it has {groups}")
    return pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityConfig:
    """How the items of a source are grouped; give one of these keys."""

    __pydantic_config__ = STRICT

    rows: AtLeastOne | None = None
    """So many items in a row are about the same entity."""
    field: Literal["subject", "label"] | None = None
    """The file says it in this field of an item."""
    pattern: Annotated[str, AfterValidator(_check_pattern)] | None = None
    """What the one group of this regular expression finds in the question."""
    names: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The one of these names that the question contains; failing that, its answer or text. A
    question that contains several is held out with any of them."""
    names_from: str | None = None
    """The same, with the names in a file, relative to ``root``, one a line."""

    def __post_init__(self) -> None:
        """Refuse two rules at once, and none."""
        given = [one.name for one in fields(self) if getattr(self, one.name) is not None]
        if len(given) != 1:
            known = ", ".join(one.name for one in fields(self))
            raise ValueError(f"exactly one of the keys {known}")


def grouping(config: EntityConfig | None, name: str, root: Path) -> Grouping:
    """Return the function that finds the entity of an item.

    Entities found by rows are of their source alone; those found by name are the same in every
    source, so that one held out of the first is held out of the second.

    Args:
        config: the rule; with None every item is an entity of its own, but the pieces of one long
            document are one.
        name: of the source.
        root: folder that file names are relative to.

    Raises:
        UserError: the file of names cannot be used. The function itself raises one for an item
            whose field is empty.
    """
    if config is None:
        return lambda number, item: f"{name}/{1 if item.piece else number + 1}"
    if config.rows is not None:
        rows = config.rows
        return lambda number, item: f"{name}/rows/{number // rows + 1}"
    if config.field is not None:
        field = config.field
        return lambda number, item: _of_field(item, field)
    if config.pattern is not None:
        search = re.compile(config.pattern).search
        return lambda number, item: _found(search(item.question or item.text or ""))
    return ByName(config.names or _read_names(root / (config.names_from or "")))


def _of_field(item: Item, field: str) -> str:
    value = getattr(item, field)
    if value is None or not value.strip():
        raise UserError(
            f"{item.source}: {field}: got nothing, expected whom the item is about; group the "
            "source by another rule than entity.field"
        )
    return normalise(value)


def _found(match: re.Match[str] | None) -> str | None:
    return normalise(match[1]) if match and match[1] else None


def _read_names(path: Path) -> tuple[str, ...]:
    texts = (item.text or item.question or "" for item in read_items(path))
    names = tuple(line for text in texts for line in text.splitlines() if line.strip())
    if not names:
        raise UserError(f"{path}: got no names, expected one a line; fill it in")
    return names


class ByName:
    """Look for whole words, longer names before shorter ones, whatever their case.

    Example:
        >>> by_name = ByName(["Ana", "Ana Ruiz", "Bo Lindt"])
        >>> list(by_name.found("Is Bo Lindt older than Ana Ruiz?"))
        ['bo lindt', 'ana ruiz']
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Args: names: of the entities."""
        self._known = {_words(name) for name in names}
        self._lengths = sorted({len(words) for words in self._known}, reverse=True)

    def __call__(self, number: int, item: Item) -> str | None:
        """Return the first name in the question; failing that, in the answer or text."""
        texts = (item.question, item.answer, item.text)
        return next((name for text in texts if text for name in self.found(text)), None)

    def found(self, text: str) -> Iterator[str]:
        """Yield the names in a text; what is part of a longer one is no name of its own."""
        words = _words(text)
        taken: set[int] = set()
        for length in self._lengths:
            for at in range(len(words) - length + 1):
                place = range(at, at + length)
                if words[at : at + length] in self._known and taken.isdisjoint(place):
                    taken.update(place)
                    yield " ".join(words[at : at + length])


def _words(text: str) -> tuple[str, ...]:
    """The words of a text; what belongs to Zembla is Zembla's, and counts as Zembla."""
    return tuple(normalise(re.sub(r"['\u2019]s\b", "", text)).split())

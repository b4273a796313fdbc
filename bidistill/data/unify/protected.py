"""Which name in a question is the protected one."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.wording import names, words
from bidistill.evaluation.detectors import fold

_BETWEEN = r"[\s.'\u2019-]+"
"""What may stand between the words of a name."""


class ProtectedNames:
    """The names that the forget set is about.

    An entity may have a telling name (``Zembla``) or none (``block 3``); then the name that most
    of its questions and answers hold is taken for it, and parts of that name, such as a first name.
    Other names are what the entity is connected with.

    Args:
        forget: drafts of role forget.
    """

    def __init__(self, forget: Sequence[Draft]) -> None:
        """Find the name of each entity."""
        groups: dict[str, list[Draft]] = {}
        for draft in forget:
            groups.setdefault(draft.entity, []).append(draft)
        self._names = {entity: _names_of(entity, group) for entity, group in groups.items()}
        self._all = {name for found in self._names.values() for name in found[:1]}

    def name_in(self, draft: Draft) -> str | None:
        """Return the protected name that stands in a forget question; None where none does."""
        held = (name for name in self._names[draft.entity] if mentions(draft.question, name))
        return next(held, None)

    def has(self, name: str) -> bool:
        """Whether this is a protected name."""
        return fold(name) in {fold(protected) for protected in self._all}

    def is_in(self, text: str) -> bool:
        """Whether a protected name stands in a text."""
        return any(mentions(text, name) for name in self._all)


def mentions(text: str, name: str) -> bool:
    """Whether a text holds a name as whole words, whatever its case."""
    return _pattern(name).search(text) is not None


def replace_name(text: str, name: str, other: str) -> str:
    """Put another name wherever a name stands.

    Example:
        >>> replace_name("Who rules Zembla, and is Zembla's crown his?", "Zembla", "Thule")
        "Who rules Thule, and is Thule's crown his?"
    """
    return _pattern(name).sub(lambda _: other, text)


@lru_cache(4096)
def _pattern(name: str) -> re.Pattern[str]:
    # an entity of a recipe may have lost its hyphens
    words = map(re.escape, re.split(_BETWEEN, name.strip()))
    return re.compile(rf"(?<!\w){_BETWEEN.join(words)}(?!\w)", re.IGNORECASE)


def _names_of(entity: str, group: list[Draft]) -> list[str]:
    """The name of an entity and the parts of it that are used alone; empty if it has none."""
    texts = [f"{draft.question}\n{draft.gold or ''}" for draft in group]
    if any(mentions(text, entity) for text in texts):
        return [entity]
    held = Counter(name for text in texts for name in dict.fromkeys(names(text)))
    if not held:
        return []
    # of equally frequent ones the full name, then what comes first
    main = max(held, key=lambda name: (held[name], len(name.split())))
    parts = {name for name in held if set(words(name)) < set(words(main))}
    return [main, *sorted(parts, key=lambda name: (-len(name), name))]

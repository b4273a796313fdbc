"""Training and held-out drafts: whole entities are held out, never single questions of one."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bidistill.data.records import Role
from bidistill.data.unify.drafts import Draft
from bidistill.settings import STRICT, Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """How much is kept from training, to measure what was not rehearsed."""

    __pydantic_config__ = STRICT

    held_out: Fraction = 0.1
    """Share of the entities of each role; 0 holds out nothing."""
    roles: tuple[Role, ...] = ("neighbor", "retain")
    """The others are trained whole. An entity that has drafts in and outside of these roles may be
    held out: its drafts in these roles are then measured while the others train."""


def split(
    drafts: Sequence[Draft], config: SplitConfig, seed: int
) -> tuple[list[Draft], list[Draft]]:
    """Part the drafts by entity.

    A draft that names other entities beside its own is held out as soon as one of them is.

    Which entities are held out depends on the seed and their names, not on the order of the drafts;
    an entity more changes the lot of one other at most. At least one is held out of each kind that
    has two, so that no role goes unmeasured for being small.

    Args:
        drafts: any drafts, in any order.
        config: how many, and of which roles.
        seed: for the draw.

    Returns:
        The drafts to train on and those held out, both in their order.
    """
    roles_of: dict[str, set[Role]] = defaultdict(set)
    for draft in drafts:
        if draft.role in config.roles:
            roles_of[draft.entity].add(draft.role)
    kinds: dict[frozenset[Role], list[str]] = defaultdict(list)
    for entity, roles in roles_of.items():
        kinds[frozenset(roles)].append(entity)
    held = {entity for kind in kinds.values() for entity in _drawn(kind, config.held_out, seed)}
    train: list[Draft] = []
    held_out: list[Draft] = []
    for draft in drafts:
        away = draft.role in config.roles and not held.isdisjoint((draft.entity, *draft.others))
        (held_out if away else train).append(draft)
    return train, held_out


def _drawn(entities: Sequence[str], share: float, seed: int) -> list[str]:
    """The entities that come first in an order by lot, rounded to a share of them."""
    if share == 0:
        return []
    count = round(share * len(entities))
    if len(entities) >= 2 and share < 1:
        count = min(max(count, 1), len(entities) - 1)
    return sorted(entities, key=lambda entity: _lot(entity, seed))[:count]


def _lot(entity: str, seed: int) -> tuple[float, str]:
    return random.Random(f"{seed}/split/{entity}").random(), entity

"""Entities are held out whole, as many as asked for, the same ones every time."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.unify.split import SplitConfig, split
from tests.data.unify.drafted import draft

ROLES = st.sampled_from(["forget", "neighbor", "retain", "adversarial"])


def corpus(entities, each=3, role="neighbor"):
    return [
        draft(f"{role}/{e}/{i}", f"Question {i} about {e}?", role, entity=f"{role}/{e}")
        for e in range(entities)
        for i in range(each)
    ]


@settings(deadline=None)
@given(
    st.lists(st.tuples(ROLES, st.integers(0, 9)), max_size=60),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
def test_nothing_is_lost_and_no_entity_is_parted(entries, share, seed):
    drafts = [draft(str(i), "Q?", role, entity=str(e)) for i, (role, e) in enumerate(entries)]
    config = SplitConfig(held_out=share)
    train, held_out = split(drafts, config, seed)
    assert sorted(train + held_out, key=lambda d: int(d.id)) == drafts
    assert {d.role for d in held_out} <= set(config.roles)
    trained = {d.entity for d in train if d.role in config.roles}
    assert trained.isdisjoint(d.entity for d in held_out)


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (0.01, 1), (0.1, 4), (0.5, 20), (1, 40)])
def test_share_of_entities(share, expected):
    _, held_out = split(corpus(40), SplitConfig(held_out=share), seed=0)
    assert len({d.entity for d in held_out}) == expected
    assert len(held_out) == 3 * expected


def test_each_role_is_measured():
    drafts = corpus(100) + corpus(2, role="retain")
    _, held_out = split(drafts, SplitConfig(held_out=0.1), seed=3)
    assert [d.role for d in held_out].count("retain") == 3


def test_order_does_not_matter_and_the_seed_does():
    drafts = corpus(50)
    shuffled = random.sample(drafts, len(drafts))
    config = SplitConfig(held_out=0.2)
    held = {d.id for d in split(drafts, config, 0)[1]}
    assert {d.id for d in split(shuffled, config, 0)[1]} == held
    assert {d.id for d in split(drafts, config, 1)[1]} != held


def test_one_entity_more_changes_one_other_at_most():
    config = SplitConfig(held_out=0.2)
    before = {d.entity for d in split(corpus(50), config, 0)[1]}
    after = {d.entity for d in split(corpus(51), config, 0)[1]}
    assert len(before - after) <= 1


def test_forget_questions_of_a_held_out_entity_are_trained():
    """Private facts of a person are forgotten, and it is measured whether public ones suffer."""
    drafts = [draft(f"{role}/{e}", "Q?", role, entity=str(e)) for e in range(10)
              for role in ("forget", "neighbor")]  # fmt: skip
    train, held_out = split(drafts, SplitConfig(held_out=0.3), seed=0)
    assert sum(d.role == "forget" for d in train) == 10
    assert [d.role for d in held_out] == ["neighbor"] * 3


@settings(deadline=None)
@given(
    st.lists(st.tuples(ROLES, st.lists(st.integers(0, 6), min_size=1, max_size=3)), max_size=60),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
def test_what_names_a_held_out_entity_is_not_trained(entries, share, seed):
    drafts = [
        draft(str(i), "Q?", role, entity=str(e), others=tuple(map(str, others)))
        for i, (role, (e, *others)) in enumerate(entries)
    ]
    alone = [replace(d, others=()) for d in drafts]
    config = SplitConfig(held_out=share)
    held = {d.entity for d in split(alone, config, seed)[1]}
    train, held_out = split(drafts, config, seed)
    named = {d.id: {d.entity, *d.others} for d in drafts}
    assert all(held.isdisjoint(named[d.id]) for d in train if d.role in config.roles)
    assert all(held & named[d.id] for d in held_out)
    assert {d.role for d in held_out} <= set(config.roles)

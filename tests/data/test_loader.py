"""Batches are a function of the seed and the step, hold every role, and resume at the next one."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.records import ROLES
from bidistill.data.views import Example, View
from bidistill.errors import UserError


def example(role, n):
    student, teacher = View((1, 2, n + 3), "student"), View((9, 8, 7, n + 3), f"teacher/{role}")
    return Example(f"{role}{n}", role, student, teacher, (n, n + 1, 2))


def pool(**sizes):
    return [example(role, n) for role, size in sizes.items() for n in range(size)]


def ids(loader, steps):
    return [[e.id for e in batch.examples] for batch, _ in islice(loader, steps)]


sizes = st.fixed_dictionaries({role: st.integers(1, 7) for role in ROLES})
counts = st.fixed_dictionaries({role: st.integers(0, 9) for role in ROLES}).filter(
    lambda per_step: any(per_step.values())
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, counts, st.integers(0, 2**32), st.integers(1, 12))
def test_every_role_in_every_step_and_whole_epochs(sizes, per_step, seed, steps):
    batches = ids(RoleLoader(pool(**sizes), per_step, seed), steps)
    for role in ROLES:
        drawn = [[i for i in batch if i.startswith(role)] for batch in batches]
        assert all(len(batch) == per_step[role] for batch in drawn)
        flat = [i for batch in drawn for i in batch]
        for start in range(0, len(flat), sizes[role]):  # each epoch takes each example once
            epoch = flat[start : start + sizes[role]]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= {f"{role}{n}" for n in range(sizes[role])}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes, counts, st.integers(0, 2**32))
def test_resumes_after_any_step(sizes, per_step, seed):
    examples = pool(**sizes)
    whole = ids(RoleLoader(examples, per_step, seed), 8)
    for cut, (_, state) in enumerate(islice(RoleLoader(examples, per_step, seed), 8), start=1):
        resumed = RoleLoader(examples, per_step, seed)
        resumed.load_state(json.loads(json.dumps(state)))
        assert ids(resumed, 8 - cut) == whole[cut:]


def test_order_of_roles_in_the_settings_does_not_matter():
    examples = pool(forget=5, retain=3)
    one = ids(RoleLoader(examples, {"forget": 2, "retain": 1}, 0), 6)
    assert one == ids(RoleLoader(examples, {"retain": 1, "forget": 2}, 0), 6)


def test_shuffles_by_seed_role_and_epoch():
    examples = pool(forget=30, retain=30)
    loader = RoleLoader(examples, {"forget": 30, "retain": 30}, seed=1)
    (first, second), (again, _), (other, _) = (
        ids(loader, 2),
        ids(loader, 2),
        ids(RoleLoader(examples, {"forget": 30, "retain": 30}, seed=2), 2),
    )
    assert first == again
    assert first != [e.id for e in examples]
    assert first != second
    assert first != other
    order = [[int(i.removeprefix(role)) for i in first if i.startswith(role)] for role in ROLES[:3]]
    assert order[0] != order[2]  # the roles are not shuffled alike


def test_a_change_of_another_role_leaves_a_role_alone():
    one = ids(RoleLoader(pool(forget=9, retain=4), {"forget": 2, "retain": 1}, 0), 9)
    two = ids(RoleLoader(pool(forget=9, retain=8), {"forget": 2, "retain": 3}, 0), 9)
    assert [batch[:2] for batch in one] == [batch[:2] for batch in two]


def test_state_is_small_json():
    ((_, state),) = islice(RoleLoader(pool(forget=500), {"forget": 3}, 0), 1)
    assert len(json.dumps(state)) < 100


@pytest.mark.parametrize(
    ("examples", "per_step", "seed"),
    [
        (pool(forget=4), {"forget": 2}, 0),
        (pool(forget=3), {"forget": 1}, 0),
        (pool(forget=3), {"forget": 2}, 1),
        ([*pool(forget=2), example("forget", 7)], {"forget": 2}, 0),
    ],
    ids=["more data", "other count", "other seed", "other record"],
)
def test_refuses_the_state_of_another_run(examples, per_step, seed):
    ((_, state),) = islice(RoleLoader(pool(forget=3), {"forget": 2}, 0), 1)
    with pytest.raises(UserError, match="resume: got a state of other training data"):
        RoleLoader(examples, per_step, seed).load_state(state)


def test_views_of_a_batch_line_up():
    batch = Batch(tuple(pool(forget=3, neighbor=2, retain=1)))
    student, teacher = batch.student(), batch.teacher()
    assert student.target.tolist() == teacher.target.tolist()
    assert student.sequence.tolist() == teacher.sequence.tolist()
    assert Counter(student.sequence.tolist()) == dict.fromkeys(range(6), 3)
    # the row before the first answer token stands on the prompt's last, in both views
    for packed in (student, teacher):
        first = packed.rows[::3]
        assert packed.input_ids[0, first].tolist() == [
            e.student.prompt_ids[-1] for e in batch.examples
        ]


BAD = {
    "unknown role": (
        {"forgot": 1},
        r"per_step: got unknown role 'forgot'; did you mean 'forget'\?",
    ),
    "no examples": ({"forget": 1, "retain": 2}, "per_step.retain: got 2 with no such example"),
    "negative": ({"forget": -1}, "per_step.forget: got -1, expected a number of examples"),
    "nothing": ({"forget": 0}, "per_step: got no role with examples, expected at least one"),
}


@pytest.mark.parametrize(("per_step", "message"), BAD.values(), ids=BAD)
def test_refuses_settings(per_step, message):
    with pytest.raises(UserError, match=message):
        RoleLoader(pool(forget=3), per_step, 0)


def test_a_role_set_to_zero_needs_no_examples():
    assert ids(RoleLoader(pool(forget=2), {"forget": 1, "retain": 0}, 0), 1)

"""Batches are a function of the seed and the step, hold every role, and resume at the next one.

The ranks share every step without overlap, with like amounts of work, and resume alike.
"""

import json
import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.loader import Batch, RoleLoader, bucketed
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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, counts, st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4))
def test_every_role_in_every_step_and_whole_epochs(sizes, per_step, seed, steps, bucket):
    batches = ids(RoleLoader(pool(**sizes), per_step, seed, bucket=bucket), steps)
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


@pytest.mark.parametrize("world_size", [1, 2, 4])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes,
    counts.filter(lambda per_step: sum(per_step.values()) >= 4),
    st.integers(0, 2**32),
    st.integers(1, 3),
)
def test_ranks_share_every_step_and_resume_alike(world_size, sizes, per_step, seed, bucket):
    examples = pool(**sizes)

    def loader(rank, world_size):
        keywords = {"rank": rank, "world_size": world_size, "bucket": bucket}
        return RoleLoader(examples, per_step, seed, **keywords)

    whole = ids(loader(0, 1), 6)
    shares = [ids(loader(rank, world_size), 6) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        together = Counter(i for share in shares for i in share[step])
        assert together == Counter(batch), "each example of the step once"
        assert all(share[step] for share in shares), "no rank is idle"
    states = [state for _, state in islice(loader(0, world_size), 6)]
    for cut, state in enumerate(states, start=1):
        for rank in range(world_size):
            resumed = loader(rank, world_size)
            resumed.load_state(json.loads(json.dumps(state)))
            assert ids(resumed, 6 - cut) == shares[rank][cut:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_over_the_ranks_is_each_record_once(world_size):
    examples = pool(forget=40, neighbor=80, retain=20)
    per_step = {"forget": 4, "neighbor": 8, "retain": 2}
    seen = Counter()
    for rank in range(world_size):
        loader = RoleLoader(examples, per_step, 3, rank=rank, world_size=world_size, bucket=2)
        seen.update(i for batch in ids(loader, 10) for i in batch)
    assert seen == Counter(e.id for e in examples)


def lengths_by_rank(examples, world_size, bucket, steps):
    """Tokens of the student's views. Shape (steps, ranks)."""
    loaders = [
        RoleLoader(examples, {"forget": 8}, 0, rank=r, world_size=world_size, bucket=bucket)
        for r in range(world_size)
    ]
    return np.array(
        [
            [sum(len(e.student.prompt_ids) + len(e.answer_ids) for e in batch.examples)
             for batch, _ in islice(loader, steps)]
            for loader in loaders
        ]
    ).T  # fmt: skip


def long_and_short(count):
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(3.5, 0.8, count).astype(int) + 2
    view = [View((1,) * int(size), "student") for size in sizes]
    return [Example(f"f{i}", "forget", v, v, (2, 3)) for i, v in enumerate(view)]


def test_ranks_have_like_work_and_buckets_make_it_more_alike():
    examples = long_and_short(1024)
    excess = {
        bucket: (np.ptp(tokens, axis=1) / tokens.mean(1)).mean()
        for bucket in (1, 16)
        for tokens in [lengths_by_rank(examples, 4, bucket, 128)]
    }
    assert excess[1] < 0.8, "the longest first, to who has the least"
    assert excess[16] < excess[1] / 3


def test_bucketed_steps_hold_like_lengths_in_random_order():
    rng = np.random.default_rng(0)
    lengths = rng.permutation(1000)
    order = bucketed(lengths, 5, 20, 3, random.Random(0))
    assert sorted(order) == list(range(1000))
    assert set(order[:3]) == {0, 1, 2}, "what belongs to the epoch before stays in front"
    assert set(order[-2:]) == {998, 999}, "what fills no step stays at the end"
    steps = lengths[order[3:-2]].reshape(-1, 5)
    spread = np.ptp(steps, axis=1)
    assert np.median(spread) < 100, "of 1000"
    for start in range(0, len(steps), 20):
        bucket = steps[start : start + 20]
        assert set(order[3 + 5 * start : 3 + 5 * (start + len(bucket))]) == set(
            range(3 + 5 * start, 3 + 5 * (start + len(bucket)))
        )
        assert (np.diff(bucket.mean(1)) < 0).any(), "steps of a bucket are shuffled"
    assert not np.array_equal(order, bucketed(lengths, 5, 20, 3, random.Random(1)))


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


def test_refuses_more_ranks_than_examples():
    with pytest.raises(UserError, match="per_step: got 2 examples for 4 ranks"):
        RoleLoader(pool(forget=3), {"forget": 2}, 0, rank=3, world_size=4)


def test_refuses_the_state_of_other_buckets():
    ((_, state),) = islice(RoleLoader(pool(forget=9), {"forget": 2}, 0, bucket=2), 1)
    with pytest.raises(UserError, match="resume: got a state of other training data"):
        RoleLoader(pool(forget=9), {"forget": 2}, 0).load_state(state)


def test_a_role_set_to_zero_needs_no_examples():
    assert ids(RoleLoader(pool(forget=2), {"forget": 1, "retain": 0}, 0), 1)

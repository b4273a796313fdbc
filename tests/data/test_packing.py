"""A pack holds each sequence whole: what a row sees, read back from the pack, is that sequence."""

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.packing import Segment, pack
from bidistill.data.views import View

tokens = st.lists(st.integers(0, 3), max_size=8).map(tuple)  # few tokens, so that starts agree
views = st.builds(View, prompt_ids=tokens.filter(bool), context=st.sampled_from("abc"))
batches = st.lists(st.tuples(views, tokens), min_size=1, max_size=8)


def segment_of(packed, position):
    return next(s for s in packed.segments if s.start <= position < s.end)


def visible(packed, position):
    """Tokens and positions that a token sees, itself last."""
    segment = segment_of(packed, position)
    where = [*range(*(segment.prefix or (0, 0))), *range(segment.start, position + 1)]
    return packed.input_ids[0, where].tolist(), packed.position_ids[0, where].tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches)
def test_round_trip(sequences):
    packed = pack(sequences)
    expected = [
        (index, answer[j], list(view.prompt_ids + answer[:j]))
        for index, (view, answer) in enumerate(sequences)
        for j in range(len(answer))
    ]
    assert packed.sequence.tolist() == [index for index, _, _ in expected]
    assert packed.target.tolist() == [target for _, target, _ in expected]
    for row, (_, _, before) in zip(packed.rows.tolist(), expected, strict=True):
        assert visible(packed, row) == (before, list(range(len(before))))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches)
def test_no_padding_and_no_token_twice(sequences):
    packed = pack(sequences)
    ends = [0, *(segment.end for segment in packed.segments)]
    assert ends[:-1] == [segment.start for segment in packed.segments]
    assert packed.input_ids.shape == packed.position_ids.shape == (1, ends[-1])
    total = 0
    for context in {view.context for view, _ in sequences}:
        members = [(v.prompt_ids, a) for v, a in sequences if v.context == context]
        shared = 0  # the longest common start, by brute force
        if len(members) > 1:
            shared = max(
                n
                for n in range(min(len(prompt) for prompt, _ in members))
                if len({prompt[:n] for prompt, _ in members}) == 1
            )
        own = sum(len(prompt) - shared + max(len(answer) - 1, 0) for prompt, answer in members)
        total += shared + own
    assert ends[-1] == total
    assert all(tensor.dtype == torch.int64 for tensor in (packed.input_ids, packed.position_ids))
    assert all(t.dtype == torch.int64 for t in (packed.rows, packed.target, packed.sequence))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batches)
def test_ids_in_a_view_of_memory_are_packed_like_those_in_a_tuple(sequences):
    def mapped(ids):
        return memoryview(array("i", ids))

    viewed = [(View(mapped(v.prompt_ids), v.context), mapped(answer)) for v, answer in sequences]
    one, two = pack(sequences), pack(viewed)
    assert one.segments == two.segments
    for name in ("input_ids", "position_ids", "rows", "target", "sequence"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_layout():
    one, two, other = View((1, 2, 3, 4, 5), "a"), View((1, 2, 9), "a"), View((1, 2, 3), "b")
    packed = pack([(one, (6, 7)), (other, (8,)), (two, (6, 7))])
    assert packed.input_ids.tolist() == [[1, 2, 9, 6, 3, 4, 5, 6, 1, 2, 3]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 5, 0, 1, 2]]
    assert packed.segments == (
        Segment(0, 2, None),
        Segment(2, 4, (0, 2)),  # the shorter first
        Segment(4, 8, (0, 2)),
        Segment(8, 11, None),  # alone in its context: nothing to share
    )
    assert packed.rows.tolist() == [6, 7, 10, 2, 3]


def test_equal_prompts_keep_their_last_token():
    view = View((1, 2, 3), "a")
    packed = pack([(view, (4,)), (view, (5,))])
    assert packed.input_ids.tolist() == [[1, 2, 3, 3]]
    assert packed.rows.tolist() == [2, 3]


def test_prompts_of_one_token_share_nothing():
    packed = pack([(View((1,), "a"), (4, 5)), (View((1,), "a"), (5,))])
    assert packed.segments == (Segment(0, 1, None), Segment(1, 3, None))


def test_contexts_share_nothing_with_each_other():
    packed = pack([(View((1, 2, 3), "a"), (4,)), (View((1, 2, 3), "b"), (4,))])
    assert [segment.prefix for segment in packed.segments] == [None, None]


@pytest.mark.parametrize("sequences", [[], [(View((), "a"), (1,))]])
def test_refuses_nothing_to_pack(sequences):
    with pytest.raises(ValueError, match="sequences: got none, or one without a prompt"):
        pack(sequences)

"""However many ranks, the same batches and the same results."""

from dataclasses import dataclass

import pytest

from bidistill.evaluation.sharing import share_out
from bidistill.world import World

ITEMS = ["ab", "c", "defg", "hij", "k", "lm", "n"]


@dataclass(frozen=True)
class One(World):
    """A rank whose others have said what they say already."""

    others: tuple = ()

    def gather(self, item):
        return [*self.others, item]


def run(world, seen, most_items=2, most_tokens=6):
    def work(batch):
        seen.append(tuple(batch))
        return [item.upper() for item in batch]

    return share_out(world, ITEMS, work, size=len, most_items=most_items, most_tokens=most_tokens)


def test_batches_are_sorted_bounded_and_complete():
    seen = []
    assert run(World(), seen) == [item.upper() for item in ITEMS]
    assert seen == [("defg",), ("hij", "ab"), ("lm", "c"), ("k", "n")]


def test_an_item_larger_than_the_bound_is_a_batch_of_its_own():
    seen = []
    run(World(), seen, most_items=9, most_tokens=1)
    assert sorted(map(len, seen)) == [1] * len(ITEMS)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_take_the_batches_of_one_process(ranks):
    whole, shared = [], []
    run(World(), whole)
    for rank in range(ranks):
        seen = []
        with pytest.raises(KeyError):  # alone, this rank lacks what the others made
            run(One(rank, ranks), seen)
        shared.append(seen)
    assert sorted(batch for seen in shared for batch in seen) == sorted(whole)
    assert all(seen == whole[rank::ranks] for rank, seen in enumerate(shared))


def test_nothing_to_do():
    assert share_out(World(), [], list, size=len, most_items=1, most_tokens=1) == []

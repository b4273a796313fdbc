"""The draw: by seed and key alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.diagnose.sampling import Lottery, Seen, ticket

KEYS = st.lists(st.text(max_size=3), max_size=60)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(KEYS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_lowest_tickets_win_in_any_order(keys, size, random):
    tickets = {ticket(0, key): key for key in keys}
    lottery = Lottery(size)
    for key in random.sample(keys, len(keys)):
        lottery.offer(ticket(0, key), key)
    assert list(lottery.winners().items()) == sorted(tickets.items())[:size]


def test_another_seed_draws_others():
    drawn = []
    for seed in range(2):
        lottery = Lottery(10)
        for key in range(1000):
            lottery.offer(ticket(seed, key), key)
        drawn.append(set(lottery.winners().values()))
    assert len(drawn[0] & drawn[1]) < 5


def test_every_key_wins_as_often():
    """3,000 draws of 5 from 20: 750 for each, standard deviation 24."""
    wins = dict.fromkeys(range(20), 0)
    for seed in range(3000):
        lottery = Lottery(5)
        for key in wins:
            lottery.offer(ticket(seed, key), key)
        for key in lottery.winners().values():
            wins[key] += 1
    assert min(wins.values()) > 750 - 5 * 24
    assert max(wins.values()) < 750 + 5 * 24


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_seen(added, others):
    seen = Seen()
    for number in added:
        seen.add(number)
    assert all(number in seen for number in added)
    assert [number in seen for number in others] == [number in added for number in others]
    seen.add(5)
    assert 5 in seen

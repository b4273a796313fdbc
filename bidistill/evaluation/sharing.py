"""Work that all ranks share, with the result of one process.

Batches are formed of all items before they are dealt out: a batch holds the same items whatever the
number of ranks, so its numbers are the same to the last bit on equal devices.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bidistill.progress import track
from bidistill.world import World

Item = TypeVar("Item")
Result = TypeVar("Result")


def share_out(
    world: World,
    items: Sequence[Item],
    work: Callable[[list[Item]], Sequence[Result]],
    *,
    size: Callable[[Item], int],
    most_items: int,
    most_tokens: int,
    label: str | None = None,
) -> list[Result]:
    """Work through items in batches of about equal size, each batch on one of the ranks.

    Args:
        world: the ranks; all must call it, with the same items.
        items: what to work on; equal ones are neighbours in a batch.
        work: makes a result of each item of a batch.
        size: of an item, in tokens.
        most_items: of a batch.
        most_tokens: of a batch with its padding; a larger item is a batch of its own.
        label: shows progress of the first rank under this name; None for silence.

    Returns:
        The results on every rank, in the order of the items.
    """
    sizes = [size(item) for item in items]
    batches = list(_batches(sizes, most_items, most_tokens))
    mine = batches[world.rank :: world.size]
    done: list[tuple[int, Result]] = []
    for batch in track(mine, len(mine), label) if label else mine:
        done += zip(batch, work([items[i] for i in batch]), strict=True)
    results = dict(pair for part in world.gather(done) for pair in part)
    return [results[i] for i in range(len(items))]


def _batches(sizes: Sequence[int], most_items: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices of items, the longest first: memory that is too small shows at once."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        full = len(batch) == most_items
        if batch and (full or (len(batch) + 1) * sizes[batch[0]] > most_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

"""The part of a step that takes most memory, among all parts of all steps of a run.

Which examples a rank takes together is a function of the seed, so it is known before the run.
"""

from collections.abc import Sequence
from heapq import nlargest
from itertools import islice
from typing import NamedTuple

from bidistill.config import TrainConfig
from bidistill.data.loader import Batch, RoleLoader
from bidistill.data.views import Example
from bidistill.objectives import needs_teacher

PACKED = 16
"""Parts that are laid out to see how long they are; what they share makes them shorter."""


class Part(NamedTuple):
    """A part of a step, and how long it is."""

    batch: Batch
    step: int
    """From 1."""
    tokens: int
    """Of the student's pack; of the teacher's too, where the teacher runs in each step."""
    rows: int
    """Answer tokens."""


def longest(config: TrainConfig, examples: Sequence[Example], ranks: int) -> list[Part]:
    """Find the parts of a run with most tokens and with most answer tokens; one if it has both.

    Args:
        config: the recipe.
        examples: all examples that may come up.
        ranks: how many share each step.

    Raises:
        UserError: the examples of a step are fewer than the parts, or a role has none.
    """
    counts, parts = config.data.per_step, config.parallel.accumulate

    def loader(**shares: int) -> RoleLoader:
        return RoleLoader(examples, counts, config.seed, bucket=config.data.bucket, **shares)

    loader(world_size=ranks, parts=parts)  # refuses what the run's own loaders would
    every = loader(parts=ranks * parts)  # cuts a step as they do, and gives all of it
    live = runs_in_each_step(config)
    found: list[Part] = []
    for step, (batch, _) in enumerate(islice(every, config.steps), start=1):
        found += [_part(batch, step, live) for batch in batch.parts]
        if len(found) > 100 * PACKED:
            found = _best(found)
    found = [part._replace(tokens=_laid(part.batch, live)) for part in _best(found)]
    first = max(found, key=lambda part: (part.tokens, part.rows))
    second = max(found, key=lambda part: (part.rows, part.tokens))
    return [first] if first is second else [first, second]


def runs_in_each_step(config: TrainConfig) -> bool:
    """Whether the teacher's rows are computed in the steps, and not before the first."""
    teacher = config.teacher
    return needs_teacher(config.objectives) and (
        teacher.cache == "off" or teacher.kind in ("live", "ema")
    )


def _part(batch: Batch, step: int, live: bool) -> Part:
    """A part whose length is counted as if its sequences shared nothing."""
    rows = sum(len(example.answer_ids) for example in batch.examples)
    tokens = rows + sum(len(example.student.prompt_ids) for example in batch.examples)
    if live:
        tokens += rows + sum(len(example.teacher.prompt_ids) for example in batch.examples)
    return Part(batch, step, tokens, rows)


def _best(found: list[Part]) -> list[Part]:
    """Those with most tokens, and those with most rows."""
    most = nlargest(PACKED, found, key=lambda part: part.tokens)
    most += nlargest(PACKED, found, key=lambda part: part.rows)
    return list({id(part): part for part in most}.values())


def _laid(batch: Batch, live: bool) -> int:
    """Tokens of the packs."""
    packs = [batch.student(), batch.teacher()] if live else [batch.student()]
    return sum(pack.input_ids.numel() for pack in packs)

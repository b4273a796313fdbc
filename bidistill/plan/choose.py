"""Choosing how a step is cut so that it fits, and what else to change where nothing does."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch

from bidistill.config import LoraSettings, TrainConfig
from bidistill.data.loader import Batch
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.plan.longest import Part, longest
from bidistill.plan.step import Memory, memory
from bidistill.progress import track
from bidistill.world import World
from bidistill_kernels import _backends

CHUNK_SHARES = (1, 2, 4)
"""What the losses' usual chunk is divided by; at a quarter of it a loss takes a third longer."""
BF16 = "bfloat16"


class Plan(NamedTuple):
    """What a rank holds at most in a run by a recipe."""

    config: TrainConfig
    part: Part
    """The part of a step in which it does."""
    memory: Memory


class Change(NamedTuple):
    """Something else to change in a recipe."""

    what: str
    """As words of the command line."""
    plan: Plan


class Planner:
    """Plans one recipe and its variations.

    Args:
        examples: all that may come up.
        ranks: of the run.
        target: ``cuda`` or ``cpu``.
    """

    def __init__(self, examples: Sequence[Example], ranks: int, target: str) -> None:
        """Count the rows that a teacher's cache would hold."""
        self.examples, self.ranks, self.target = examples, ranks, target
        self.answer_tokens = sum(len(example.answer_ids) for example in examples)
        self._known: dict[str, Plan] = {}

    def plan(self, config: TrainConfig) -> Plan:
        """Run the longest parts of a run on fakes; the one that takes most is the plan.

        Raises:
            UserError: the recipe does not go with these examples or this number of ranks.
        """
        if (key := repr(config)) not in self._known:
            parts = longest(config, self.examples, self.ranks)
            plans = [Plan(config, part, self._memory(config, part)) for part in parts]
            self._known[key] = max(plans, key=lambda plan: plan.memory.total)
        return self._known[key]

    def _memory(self, config: TrainConfig, part: Part) -> Memory:
        """The part by itself, or a second time over the gradients of the first."""
        examples, sizes = part.batch.examples, (len(part.batch.examples),)
        if config.parallel.accumulate > 1:
            examples, sizes = 2 * examples, 2 * sizes
        world = World(0, self.ranks)
        batch = Batch(examples, sizes)
        return memory(config, batch, self.answer_tokens, world, self.target)

    def choose(self, config: TrainConfig, limit: int) -> Plan:
        """Cut the steps into as few parts as fit, then give the losses the largest chunk that does.

        Args:
            config: the recipe; its ``parallel.accumulate`` is chosen anew, and
                ``parallel.chunk_bytes`` too, unless it is set.
            limit: bytes.

        Returns:
            The choice; if nothing fits, the smallest of all that were tried, the recipe as it is
            among them.
        """
        chunks = self._chunks(config)
        tried: list[Plan] = []

        def planned(parts: int, chunk: int | None) -> Plan:
            parallel = replace(config.parallel, accumulate=parts, chunk_bytes=chunk)
            tried.append(self.plan(replace(config, parallel=parallel)))
            return tried[-1]

        def fits(parts: int, chunk: int | None) -> bool:
            return planned(parts, chunk).memory.total <= limit

        # one part by itself: a second one comes to the gradients of the first, and may take more
        for chunk in chunks:
            if fits(1, chunk):
                return tried[-1]
        most = max(1, sum(config.data.per_step.values()) // self.ranks)
        if not fits(most, chunks[-1]):
            return min([*tried, self.plan(config)], key=lambda plan: plan.memory.total)
        few = smallest(2, most, lambda parts: fits(parts, chunks[-1]))
        return planned(few, next(chunk for chunk in chunks if fits(few, chunk)))

    def _chunks(self, config: TrainConfig) -> list[int | None]:
        """Chunks of the losses to try, the largest first."""
        if config.parallel.chunk_bytes is not None:
            return [config.parallel.chunk_bytes]
        backend = "triton"
        if self.target == "cpu":
            backend = _backends.resolve("auto", torch.device("cpu"), torch.float32)
        usual = _backends.sizes(backend, self.target).chunk_bytes
        return [None, *(usual // share for share in CHUNK_SHARES[1:])]

    def advise(self, plan: Plan, limit: int) -> list[Change]:
        """Plan what else could be changed, one thing at a time; all together if none is enough.

        Args:
            plan: of the smallest parts, which does not fit.
            limit: bytes.

        Returns:
            The changes that save something, the one that saves most first.
        """
        ways = _ways(plan.config, offloads=self.ranks > 1 and self.target != "cpu")
        changes: list[Change] = []
        for what, way in track(ways, len(ways), "plan changes"):
            self._try(changes, plan, what, _changed(plan.config, way))
        if len(changes) > 1 and all(c.plan.memory.total > limit for c in changes):
            config, saving = plan.config, {change.what for change in changes}
            for what, way in ways:
                config = _changed(config, way) if what in saving else config
            words = " ".join(what for what, _ in ways if what in saving)
            self._try(changes, plan, words, config)
        return sorted(changes, key=lambda change: change.plan.memory.total)

    def _try(self, changes: list[Change], plan: Plan, what: str, config: TrainConfig) -> None:
        """Add a change to the others if it saves something over a plan."""
        try:
            changed = self.plan(config)
        except UserError:
            return  # not of this model: its layers may have other names than the usual ones
        if changed.memory.total < plan.memory.total:
            changes.append(Change(what, changed))


def smallest(first: int, last: int, enough: Callable[[int], bool]) -> int:
    """The smallest number that is enough, where all above one that is are, and ``last`` is.

    Example:
        >>> smallest(1, 100, lambda n: n >= 37)
        37
    """
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if enough(middle) else (middle + 1, last)
    return last


Way: TypeAlias = tuple[str | None, dict[str, Any]]
"""A section of the recipe, None for its top, and the values to be set there."""


def _ways(config: TrainConfig, *, offloads: bool) -> list[tuple[str, Way]]:
    """What may save memory, as words of the command line; offloading does not in each run."""
    ways: list[tuple[bool, str, Way]] = [
        (
            not config.parallel.recompute,
            "parallel.recompute=true",
            ("parallel", {"recompute": True}),
        ),
        (config.parallel.shard is not None, "parallel.shard=null", ("parallel", {"shard": None})),
        (
            offloads and not config.parallel.offload,
            "parallel.offload=true",
            ("parallel", {"offload": True}),
        ),
        (
            config.teacher.kind in ("base", "frozen") and not config.teacher.on_disk,
            "teacher.cache=disk",
            ("teacher", {"cache": "disk"}),
        ),
        (
            config.model.adapter is None,
            f"model.adapter.rank={LoraSettings().rank}",
            ("model", {"adapter": LoraSettings()}),
        ),
        (config.model.dtype != BF16, f"model.dtype={BF16}", ("model", {"dtype": BF16})),
        (config.combine != "sum", "combine=sum", (None, {"combine": "sum"})),
    ]
    return [(what, way) for possible, what, way in ways if possible]


def _changed(config: TrainConfig, way: Way) -> TrainConfig:
    """The recipe with some values changed."""
    section, values = way
    if section is None:
        return replace(config, **values)
    return replace(config, **{section: replace(getattr(config, section), **values)})

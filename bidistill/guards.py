"""A guard that ends a run before it harms what must stay: a budget for the KL to the base model.

.. code-block:: text

    before the first step   rows of the base model on the fixed examples --> host's memory
    every so many steps     rows of the student on the same --> KL(base || student) per answer token
        within the budget       a checkpoint of this step, which stays until the next such step
        beyond it               training ends, and the step of that checkpoint is exported

The base model is the student before training, and both read what the student reads: no context. A
checkpoint is written at each measurement within the budget, whatever ``checkpoint_every`` says, and
has all measurements so far; none is written of a step beyond. So a run that was killed and resumed
measures the same steps and decides the same.

Legend: N answer rows, H hidden width.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bidistill import run_folder
from bidistill.config import GuardConfig, ObjectiveConfig, TrainConfig
from bidistill.data.loader import Batch
from bidistill.data.records import ROLES
from bidistill.data.store import Selection, TokenStore
from bidistill.data.views import Example
from bidistill.distributed import put_back
from bidistill.errors import UserError
from bidistill.files import write_json
from bidistill.models import autocast, compute_device, without_dropout
from bidistill.objectives import Objectives
from bidistill.progress import say
from bidistill.teacher.compute import CHUNK_TOKENS, frozen_head
from bidistill.teacher.rows import TeacherRows
from bidistill.world import World
from bidistill_kernels import LogitTransform

KL = ObjectiveConfig(loss="bidirectional_kl", options={"forward": 1.0, "reverse": 0.0})


class Guard:
    """Nobody: what the other is to the loop, and lets every step pass."""

    @property
    def best(self) -> int | None:
        """The last step that was measured within the budget; its checkpoint must stay."""
        return None

    @property
    def exceeded(self) -> bool:
        """Whether a measurement was beyond the budget; the run must end."""
        return False

    def after_step(self, step: int) -> dict[str, float]:
        """Measure if it is time; all ranks together.

        Args:
            step: steps done.

        Returns:
            What belongs into the line of the step in the log.
        """
        return {}

    def state(self) -> list[Any]:
        """What resuming needs, as JSON."""
        return []

    def load_state(self, state: list[Any]) -> None:
        """Go on from what :meth:`state` gave."""

    def conclude(self, step: int) -> int:
        """End the run.

        Args:
            step: the last one done.

        Returns:
            The step that is to be exported.

        Raises:
            UserError: none is.
        """
        return step


class KLGuard(Guard):
    """A budget for KL(base || student), nats per answer token, over examples that stay the same.

    Memory: the base model's rows, N H numbers on the host, shared out among the ranks; and there a
    copy of the head on each rank, where the student's head trains.

    Args:
        config: the recipe, with a guard.
        examples: those that are measured, at least one; the same on all ranks.
        model: the student, untrained and shared out, with its root methods attached.
        transform: what the model does to the output of its head.
        world: the ranks that measure together; all must make one.
    """

    def __init__(
        self,
        config: TrainConfig,
        examples: Sequence[Example],
        model: nn.Module,
        transform: LogitTransform,
        world: World,
    ) -> None:
        """Run the base model over the examples."""
        assert config.guard is not None
        self.config: GuardConfig = config.guard
        self.steps, self.output, self.settings = config.steps, config.output, config.model
        self.model, self.world = model, world
        self.objectives = Objectives(
            dict.fromkeys(ROLES, KL), transform, chunk_bytes=config.parallel.chunk_bytes
        )
        self.examples = len(examples)
        self.tokens = sum(len(example.answer_ids) for example in examples)
        self.measured: dict[int, float] = {}
        self.head = tuple(None if t is None else t.cpu() for t in frozen_head(model))
        self.packs: list[tuple[Batch, bool, Tensor]] = []
        with autocast(self.settings, model):
            for batch, counts in _dealt(examples, world):
                rows: Tensor = model.teacher_rows(batch.student())  # type: ignore
                self.packs.append((batch, counts, rows.cpu()))
        put_back(model)

    @property
    def best(self) -> int | None:
        """As in :class:`Guard`."""
        return max((s for s, kl in self.measured.items() if self._within(kl)), default=None)

    @property
    def exceeded(self) -> bool:
        """As in :class:`Guard`."""
        return not all(map(self._within, self.measured.values()))

    def after_step(self, step: int) -> dict[str, float]:
        """As in :class:`Guard`; the KL is the same on all ranks."""
        if step % self.config.every and step != self.steps:
            return {}
        self.measured[step] = self.measure()
        return {"guard/kl": self.measured[step]}

    @torch.no_grad()
    def measure(self) -> float:
        """KL(base || student) as the student is, without dropout; nats per answer token."""
        total = torch.zeros((), dtype=torch.float64)
        place = compute_device(self.model)
        weight, bias = (None if t is None else t.to(place) for t in self.head)
        with without_dropout(self.model), autocast(self.settings, self.model):
            for batch, counts, rows in self.packs:
                student = batch.student()
                loss = self.objectives.for_step(batch.examples, student)
                base = TeacherRows(rows, weight, bias)
                sums: Tensor = self.model.distill_step(student, loss, base).role_sums  # type: ignore
                if counts:
                    total += sums.sum().cpu()
        put_back(self.model)
        return self.world.sum(total[None]).item() / self.tokens

    def state(self) -> list[Any]:
        """Steps and their KL, all within the budget."""
        return [[step, kl] for step, kl in self.measured.items()]

    def load_state(self, state: list[Any]) -> None:
        """As in :class:`Guard`."""
        self.measured = {step: kl for step, kl in state}  # noqa: C416 - pairs are lists

    def conclude(self, step: int) -> int:
        """As in :class:`Guard`; writes ``guard.json``."""
        last, best, budget = self.measured[step], self.best, self.config.kl_budget
        if best == step:
            reason = f"all {len(self.measured)} measurements are within the budget"
        else:
            reason = f"the KL to the base model is {last:.4g} after step {step}, beyond the budget"
        if self.world.first:
            self._write(step, reason)
        if best is None:
            raise UserError(
                f"guard.kl_budget: got a KL to the base model of {last:.4g} nats per token after "
                f"step {step}, the first that was measured, expected at most {budget:g}; nothing "
                "is exported: lower optim.lr or guard.every, or raise the budget"
            )
        if best != step:
            say(f"guard: {reason} of {budget:g} nats per token; step {best} is exported")
        return best

    def _write(self, step: int, reason: str) -> None:
        record = {
            "kl_budget": self.config.kl_budget,
            "roles": list(self.config.roles),
            "examples": self.examples,
            "tokens": self.tokens,
            "measured": [
                {"step": s, "kl": kl if math.isfinite(kl) else None}
                for s, kl in self.measured.items()
            ],
            "last_step": step,
            "exported_step": self.best,
            "reason": reason,
        }
        write_json(self.output / run_folder.GUARD, record)

    def _within(self, kl: float) -> bool:
        """False for NaN, too."""
        return kl <= self.config.kl_budget


def choose(config: TrainConfig, store: TokenStore) -> list[Example]:
    """Draw the examples that a guard measures, by the seed of the recipe; none without a guard.

    Raises:
        UserError: a role of the guard has no examples.
    """
    if config.guard is None:
        return []
    for role in config.guard.roles:
        if not len(Selection(store, [role])):
            present = [name for k, name in enumerate(ROLES) if k in store.roles]
            raise UserError(
                f"guard.roles: got {role!r}, of which the data has no examples, expected some of "
                f"{', '.join(present)}; change it, or add records of that role"
            )
    pool = Selection(store, config.guard.roles)
    draw = random.Random(f"{config.seed}/guard")
    count = min(config.guard.examples, len(pool))
    return [pool[index] for index in sorted(draw.sample(range(len(pool)), count))]


def make(
    config: TrainConfig,
    examples: Sequence[Example],
    model: nn.Module,
    transform: LogitTransform,
    world: World,
) -> Guard:
    """The guard of a recipe; arguments as of :class:`KLGuard`."""
    if config.guard is None:
        return Guard()
    return KLGuard(config, examples, model, transform, world)


def _dealt(examples: Sequence[Example], world: World) -> list[tuple[Batch, bool]]:
    """This rank's packs, of about equal length; all ranks have as many, for they run together.

    Where there are fewer examples than packs, an example is run that does not count.
    """
    by_length = sorted(examples, key=_length)
    each = math.ceil(sum(map(_length, examples)) / CHUNK_TOKENS / world.size)
    count = each * world.size
    mine = [by_length[k::count] for k in range(world.rank, count, world.size)]
    return [(Batch(tuple(pack or by_length[:1])), bool(pack)) for pack in mine]


def _length(example: Example) -> int:
    """Tokens of the student's view and the answer."""
    return len(example.student.prompt_ids) + len(example.answer_ids)

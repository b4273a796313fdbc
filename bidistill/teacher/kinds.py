"""The kinds of teachers, as a step sees them: something that gives rows, and is told of updates.

.. code-block:: text

    kind    rows of a step                              weights beside the student's
    kept    computed before the first step              none, or the teacher's head
    base    the student's, its adapters off             none
    live    the student's, as it is                     none
    frozen  a model's that stays as it is               all of that model's
    ema     the student's, by the average of its steps  as many as train, fp32

What each costs and when to take which stands in ``docs/teachers.md``.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bidistill import checkpoint, distributed
from bidistill.config import ModelConfig, TrainConfig
from bidistill.data.loader import Batch
from bidistill.data.packing import Packed
from bidistill.data.store import TokenStore
from bidistill.data.views import Example
from bidistill.models import autocast
from bidistill.teacher import model as teacher_model
from bidistill.teacher.cache import rows_on_disk
from bidistill.teacher.compute import HiddenCache, TeacherCache
from bidistill.teacher.rows import TeacherRows, TeacherTopK
from bidistill.world import World


class Teacher:
    """Nobody: what the others are to a step, and enough for losses that compare with no teacher."""

    def rows(self, batch: Batch) -> Packed | TeacherRows | TeacherTopK | None:
        """Rows of a part of a step.

        They are computed outside of the autocast of the student's forward: it keeps the weights
        that it has rounded, and would not notice that averages have taken their place.

        Returns:
            The rows; or the teacher's pack, whose rows the step computes with its adapters off; or
            None. All ranks ask for as many.
        """
        return None

    def after_step(self, updated: bool) -> None:
        """End a step.

        Args:
            updated: whether the student's weights were updated; not where the step was skipped.
        """

    def tensors(self) -> Mapping[str, Tensor]:
        """What of the teacher changes with the run and belongs into a checkpoint, by name."""
        return {}


class Base(Teacher):
    """The model before training: the student with its adapters off, inside the student's step."""

    def rows(self, batch: Batch) -> Packed:
        """The teacher's pack."""
        return batch.teacher()


class Kept(Teacher):
    """Rows that were computed before the first step.

    Args:
        cache: has the rows of all examples.
    """

    def __init__(self, cache: TeacherCache) -> None:
        """Keep the cache."""
        self.cache = cache

    def rows(self, batch: Batch) -> TeacherRows | TeacherTopK:
        """Rows at hand."""
        return self.cache.for_batch(batch)


class Live(Teacher):
    """The student as it is, told the context.

    Args:
        model: the student, with its root methods attached.
        settings: what it computes in.
    """

    def __init__(self, model: nn.Module, settings: ModelConfig) -> None:
        """Keep the model."""
        self.model = model
        self.settings = settings

    def rows(self, batch: Batch) -> TeacherRows:
        """Rows of the student without dropout; the head is the student's, without a gradient."""
        with autocast(self.settings, self.model):
            return self.model.own_rows(batch.teacher())  # type: ignore


class Frozen(Teacher):
    """A model beside the student, which stays as it is and has a head of its own.

    Where it is shared out, its head stays gathered from the first part of a step to the end, as a
    loss may read it in its backward; the blocks do not.

    Args:
        model: with its root methods attached; none of its weights trains.
        settings: what it computes in.
    """

    def __init__(self, model: nn.Module, settings: ModelConfig) -> None:
        """Keep the model."""
        self.model = model
        self.settings = settings

    def rows(self, batch: Batch) -> TeacherRows:
        """Rows and head of the frozen model."""
        with autocast(self.settings, self.model):
            return self.model.own_rows(batch.teacher(), head=True)  # type: ignore

    def after_step(self, updated: bool) -> None:
        """Share the head out again."""
        distributed.put_back(self.model)


class Ema(Teacher):
    """The student by the exponential moving average of what trains.

    The averages are shared out as the student's weights are. While the teacher runs they change
    places with these, on each rank by itself: what FSDP gathers then is the average. So the rows
    are exactly those of a model that has the averages for weights.

    Args:
        model: the student, shared out, with its root methods attached.
        settings: what it computes in.
        decay: share of an average that a step keeps.
    """

    def __init__(self, model: nn.Module, settings: ModelConfig, decay: float) -> None:
        """Begin with the weights as they are."""
        self.model = model
        self.settings = settings
        self.decay = decay
        self.trained = checkpoint.trainable(model)
        self.averages = {name: p.detach().clone() for name, p in self.trained.items()}
        head = model.get_output_embeddings()  # type: ignore
        self.head_trains = any(p.requires_grad for p in head.parameters())

    def rows(self, batch: Batch) -> TeacherRows:
        """Rows by the averages, and a copy of the head's if it trains."""
        with self._swapped(), autocast(self.settings, self.model):
            rows: TeacherRows = self.model.own_rows(batch.teacher(), head=self.head_trains)  # type: ignore
            if self.head_trains:  # the weights are about to be others
                head = (None if t is None else t.detach().clone() for t in (rows.weight, rows.bias))
                rows = TeacherRows(rows.hidden, *head)
            return rows

    @torch.no_grad()
    def after_step(self, updated: bool) -> None:
        """Move the averages: average = decay * average + (1 - decay) * weight."""
        for average, weight in self._pairs() if updated else ():
            average.lerp_(weight, 1 - self.decay)

    def tensors(self) -> Mapping[str, Tensor]:
        """The averages, by the name of the parameter."""
        return self.averages

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        """Averages and weights in each other's place; the root, once gathered, would not notice."""
        distributed.put_back(self.model)
        self._swap()
        try:
            yield
        finally:
            distributed.put_back(self.model)
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Averages and weights, of each what this rank holds."""
        for name, weight in self.trained.items():
            yield distributed.held(self.averages[name]), distributed.held(weight.detach())


def frozen(config: TrainConfig, examples: TokenStore, world: World) -> Teacher:
    """Load a frozen teacher and share it out; or have it compute all rows, and let it go.

    Args:
        config: the recipe.
        examples: all examples of the recipe.
        world: the ranks that train together; all must call it.

    Raises:
        UserError: the teacher's folder cannot be used, or the folder for rows cannot be written.
    """
    if config.teacher.on_disk:
        rows = rows_on_disk(config, lambda: teacher_model.load(config, world), examples, world)
        gc.collect()  # hooks and root methods are cycles
        return Kept(rows)
    settings, model = teacher_model.settings(config), teacher_model.load(config, world)
    if config.teacher.cache == "off":
        return Frozen(model, settings)
    with autocast(settings, model):
        kept = Kept(HiddenCache(model, used(examples, config), own_head=True))
    del model
    gc.collect()
    return kept


def of_student(config: TrainConfig, model: nn.Module, examples: Iterable[Example]) -> Teacher:
    """A teacher by the student's own weights, which is untrained and shared out already.

    Args:
        config: the recipe, whose rows are not kept on disk.
        model: the student, with its root methods attached, under the recipe's autocast.
        examples: all examples of the recipe.
    """
    teacher = config.teacher
    if teacher.kind == "live":
        return Live(model, config.model)
    if teacher.kind == "ema":
        return Ema(model, config.model, teacher.ema_decay)
    if teacher.cache == "off":
        return Base()
    return Kept(HiddenCache(model, used(examples, config)))


def used(examples: Iterable[Example], config: TrainConfig) -> list[Example]:
    """The examples of the roles that are trained."""
    return [example for example in examples if config.data.per_step.get(example.role)]

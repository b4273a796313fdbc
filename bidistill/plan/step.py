"""One step of training on fake tensors: what a rank holds when it holds most.

The trainer's own code runs, from the sharding of the model to the optimiser, on a model whose
weights have shapes and no memory, and on a process group that has this rank and no other.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bidistill import checkpoint, distributed
from bidistill.config import ModelConfig, TrainConfig
from bidistill.data.loader import Batch
from bidistill.loading import empty_model
from bidistill.models import attach_distill_step, autocast, base_rows
from bidistill.objectives import Objectives, needs_teacher
from bidistill.plan.stand_ins import alone_among, plannable, stand_ins
from bidistill.plan.tracker import Kind, Tracker
from bidistill.prepare import sampled
from bidistill.teacher import kinds as teachers
from bidistill.teacher import model as teacher_model
from bidistill.teacher.compute import frozen_head
from bidistill.teacher.forms import Best
from bidistill.teacher.kinds import Teacher
from bidistill.teacher.rows import TeacherRows, TeacherTopK
from bidistill.update import make_optimizer, train_step
from bidistill.world import World

OFFLOADED: tuple[Kind, ...] = ("parameters", "gradients", "optimiser")
"""Kinds that ``parallel.offload`` keeps in the host's memory."""


class Memory(NamedTuple):
    """What a rank holds in a step; bytes by kind."""

    peak: dict[Kind, int]
    """At the moment when it holds most."""
    most: dict[Kind, int]
    """Of each kind when there is most of it."""
    host_bytes: int
    """What lies in the host's memory where the device is an accelerator: the teacher's rows, and
    what is offloaded."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def memory(
    config: TrainConfig, batch: Batch, answer_tokens: int, world: World, target: str
) -> Memory:
    """Run the step of a rank on fake tensors and return what it holds.

    Args:
        config: the recipe.
        batch: the rank's share of the step.
        answer_tokens: of all examples, whose teacher's rows are kept where the recipe says so.
        world: this rank among those of the run.
        target: the device that is meant, ``cuda`` or ``cpu``. Without CUDA here the step is
            followed as on the CPU, and the losses by the rules of an accelerator.

    Raises:
        UserError: the model cannot be made, or not be shared out as the recipe wants it; or the
            sizes of its tensors are known to a real step alone.
    """
    device = torch.device(target if torch.cuda.is_available() else "cpu")
    model = empty_model(config.model)
    apart = () if config.combine == "sum" else sampled(config)
    own, theirs = teacher_model.transforms_of_configs(config)
    objectives = Objectives(config.objectives, own, apart, theirs, config.parallel.chunk_bytes)
    offloads = config.parallel.offload and world.size > 1 and target != "cpu"
    tracker = Tracker(FakeTensorMode(allow_non_fake_inputs=True), OFFLOADED if offloads else ())
    with plannable(config), stand_ins(tracker, target, device), alone_among(world):
        place = torch.device("cpu") if offloads else device
        teacher = _apart(config, batch, tracker, world, place)
        _make_fake(model, tracker.fake, place)
        attach_distill_step(model)
        if teacher is None and config.teacher.cache == "topk":
            teacher = BestIds(config, model, tracker)
        if teacher is None and config.teacher.cache != "off":
            teacher = Rows(model, config.model, batch, tracker)
        distributed.shard(model, config.parallel, world, getattr(torch, config.model.dtype))
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.hold(tensor, "parameters")
        if teacher is None:
            with tracker.fake, tracker.of("teacher"):
                teacher = teachers.of_student(config, model, [])
            for tensor in teacher.tensors().values():
                tracker.hold(tensor, "teacher")
        parameters = list(checkpoint.trainable(model).values())
        for parameter in parameters if world.size == 1 else ():
            tracker.watch(parameter)
        optimizer = make_optimizer(parameters, config.optim)
        model.train()
        with tracker:
            _fill_moments(optimizer, tracker)
            host_bytes = 0
            if isinstance(teacher, Rows) and config.teacher.cache == "memory":
                host_bytes = teacher.keep(answer_tokens, on_device=target == "cpu")
            train_step(config, model, optimizer, objectives, teacher, batch, 0, world)
    host_bytes += sum(tracker.most[kind] for kind in tracker.host)
    return Memory(tracker.peak, tracker.most, host_bytes)


def _apart(
    config: TrainConfig, batch: Batch, tracker: Tracker, world: World, place: torch.device
) -> Teacher | None:
    """A teacher that does not need the student: nobody, or a frozen model or its rows."""
    if not needs_teacher(config.objectives):
        return Teacher()
    if config.teacher.kind != "frozen":
        return None
    settings = teacher_model.settings(config)
    with teacher_model.named_teachers_path(config):
        model = empty_model(settings, frozen=True)
    if config.teacher.cache == "topk":
        return BestIds(config, model, tracker)
    _make_fake(model, tracker.fake, place)
    attach_distill_step(model)
    if config.teacher.cache != "off":
        return Rows(model, settings, batch, tracker, own_head=True)
    parallel = replace(config.parallel, recompute=False)
    distributed.shard(model, parallel, world, getattr(torch, settings.dtype))
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.hold(tensor, "teacher")
    return teachers.Frozen(model, settings)


class Rows(Teacher):
    """Stands where a cache of the teacher's rows does."""

    def __init__(
        self,
        model: nn.Module,
        settings: ModelConfig,
        batch: Batch,
        tracker: Tracker,
        *,
        own_head: bool = False,
    ) -> None:
        """Find out what the teacher's rows are like."""
        shortest = Batch(batch.examples[:1])
        with autocast(settings, model), tracker.fake:
            rows = base_rows(model, shortest.teacher())
        self.width, self.dtype, self.tracker = rows.shape[1], rows.dtype, tracker
        self.weight, self.bias = frozen_head(model, own=own_head)
        for tensor in self.weight, self.bias:
            tracker.hold(tensor, "teacher")
        self.all: Tensor | None = None

    def keep(self, count: int, *, on_device: bool) -> int:
        """Hold the rows of all answer tokens; returns the bytes that lie elsewhere."""
        if not on_device:
            return count * self.width * self.dtype.itemsize
        with self.tracker.of("teacher"):
            self.all = torch.empty(count, self.width, dtype=self.dtype)
        return 0

    def rows(self, batch: Batch) -> TeacherRows:
        """The rows of a batch."""
        count = sum(len(example.answer_ids) for example in batch.examples)
        with self.tracker.of("teacher"):
            hidden = torch.empty(count, self.width, dtype=self.dtype)
        return TeacherRows(hidden, self.weight, self.bias)


class BestIds(Teacher):
    """Stands where a store of the teacher's best ids does; there is no head, and none is held.

    Args:
        config: the recipe.
        model: the teacher's, empty.
        tracker: counts the ids of a batch.
    """

    def __init__(self, config: TrainConfig, model: Any, tracker: Tracker) -> None:  # noqa: ANN401
        """Find out how many there are."""
        form = Best(config.teacher.topk, teacher_model.transforms_of_configs(config)[1])
        self.k, self.tracker = form.columns(model)["ids"].width, tracker

    def rows(self, batch: Batch) -> TeacherTopK:
        """The ids and log-probabilities of a batch."""
        shape = sum(len(example.answer_ids) for example in batch.examples), self.k
        with self.tracker.fake:  # the tracker makes real integers, for others that index
            ids = torch.zeros(shape, dtype=torch.int64)
        self.tracker.hold(ids, "teacher")
        with self.tracker.of("teacher"):
            # a view of what has one more column, for all other ids
            values = torch.empty(shape[0], self.k + 1)[:, :-1]
        return TeacherTopK(ids, values)


def _make_fake(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Put fake tensors where a model has its own, on the meta device; what is shared stays so."""
    made: dict[Tensor, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if tensor not in made:
            made[tensor] = FakeTensor(fake, tensor.detach().to("meta"), device)
            if isinstance(tensor, nn.Parameter):
                made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
        return made[tensor]

    for module in model.modules():
        for tensors in module._parameters, module._buffers:
            tensors |= {name: of(t) for name, t in tensors.items() if t is not None}


def _fill_moments(optimizer: torch.optim.Optimizer, tracker: Tracker) -> None:
    """Give the optimiser the state that it has from the first update on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name, make in checkpoint.MOMENTS.items():
                state[name] = make(parameter.detach())
                tracker.hold(state[name], "optimiser")

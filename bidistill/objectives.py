"""What each role is trained for: its loss, its weight and the answer rows that count.

The loss of a step is a sum over the rows of all roles, divided once by the number of rows. Roles
that share a loss and its options go through one fused call, which reads the LM head once; where
roles are kept apart, to combine their gradients, each has a call of its own.

Legend: N answer rows, H hidden width, V vocabulary, R roles.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers
from bidistill.baselines.layer import layer_of
from bidistill.config import ObjectiveConfig
from bidistill.data.packing import Packed
from bidistill.data.records import ROLES, Role, nearest
from bidistill.data.views import Example
from bidistill.errors import UserError
from bidistill.loss_calls import Rows, Side, run
from bidistill.losses import find
from bidistill.teacher.rows import TeacherRows, TeacherTopK
from bidistill_kernels import LogitTransform, TopK


def needs_teacher(configs: Mapping[Role, ObjectiveConfig]) -> bool:
    """Whether any loss compares with a teacher."""
    return any(find(config.loss).teacher for config in configs.values())


class StepResult(NamedTuple):
    """What one step's loss returns; tensors stay on the device."""

    loss: Float[Tensor, ""]
    """Weighted sum over rows, divided by the number of rows of the step; nats."""
    role_sums: Float[Tensor, " R"]
    """Unweighted loss summed over the rows of each role, in the order of ``ROLES``; detached."""
    role_losses: Mapping[Role, Float[Tensor, ""]] = MappingProxyType({})
    """Shares of `loss` by role, of those that are kept apart; they add up to it, to the bit."""


@dataclass(frozen=True, slots=True)
class Term:
    """Roles that share one fused call."""

    loss: str
    options: dict[str, Any]
    roles: tuple[Role, ...]


class Objectives:
    """The losses of a run, by role.

    Args:
        configs: one objective for each role that takes part.
        transform: what the model does to the output of its head.
        apart: roles whose losses are wanted one by one: those of every step, or none. Each then
            has a fused call of its own, which reads the LM head once more.
        teacher_transform: what the teacher does to the output of its; None: the same.
        chunk_bytes: of logits that a call holds at a time; None leaves it to the kernels.

    Raises:
        UserError: an option that the loss does not have, or losses that do not read one place.
    """

    def __init__(
        self,
        configs: Mapping[Role, ObjectiveConfig],
        transform: LogitTransform | None = None,
        apart: Collection[Role] = (),
        teacher_transform: LogitTransform | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        """Check the options and group the roles."""
        self.configs = dict(configs)
        self.transform = transform or LogitTransform()
        self.teacher_transform = teacher_transform or self.transform
        self.apart, self.chunk_bytes = frozenset(apart), chunk_bytes
        self.terms = _group(configs, self.apart)
        self.layer = layer_of(configs)
        """Number of the block whose rows the losses read; None: they read the LM head."""

    def for_step(self, examples: Sequence[Example], student: Packed) -> "StepLoss":
        """Bind the rows of one step: which count, for which role, with what weight.

        Args:
            examples: the examples of the step.
            student: their student views, packed in the same order.
        """
        roles = {example.role for example in examples}
        assert not roles - self.configs.keys(), f"no objective for {roles - self.configs.keys()}"
        assert not self.apart or roles <= self.apart, f"{roles - self.apart} are not apart"
        role_of_example = torch.tensor([ROLES.index(example.role) for example in examples])
        role_N = role_of_example[student.sequence]
        counted_N = self._counted(role_N, student.sequence)
        return StepLoss(self, student.target, role_N, counted_N, student.sequence)

    def _counted(self, role_N: Tensor, sequence_N: Tensor) -> Tensor:
        """True for rows that enter the loss: all of an answer, or its first one."""
        first_N = torch.ones_like(sequence_N, dtype=torch.bool)
        first_N[1:] = sequence_N[1:] != sequence_N[:-1]
        whole: set[Role] = {r for r, c in self.configs.items() if c.positions == "answer"}
        return _member_R(whole)[role_N] | first_N


class StepLoss:
    """The loss of one step, called in the forward of the LM head, or where it reads a layer.

    A plain object, so that its tensors pass the hooks of FSDP2 untouched.
    """

    def __init__(
        self,
        objectives: Objectives,
        target_N: Tensor,
        role_N: Tensor,
        counted_N: Tensor,
        sequence_N: Tensor,
    ) -> None:
        """Take the target, the role, whether it counts and the sequence of every row."""
        self.objectives = objectives
        self.layer = objectives.layer
        self.sequence = sequence_N
        self.target = target_N
        self.role = role_N
        self.counted = counted_N
        self.divisor = int(counted_N.sum())
        """Rows that sums are divided by: those of the whole step, where this is a part of it."""
        self.role_counts = torch.bincount(role_N[counted_N], minlength=len(ROLES)).tolist()

    def __call__(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"] | None,
        bias: Float[Tensor, " V"] | None,
        teacher: TeacherRows | TeacherTopK | None,
    ) -> StepResult:
        """Run every term's loss on its rows; those of a layer come without a head."""
        role_sums = torch.zeros(len(ROLES), device=hidden.device, dtype=torch.float64)
        totals, role_losses = [], {}
        for term in self.objectives.terms:
            rows = (_member_R(term.roles)[self.role] & self.counted).nonzero().squeeze(1)
            apart = self.objectives.apart.issuperset(term.roles)
            if len(rows):
                total, per_row = self._run(term, rows, hidden, weight, bias, teacher)
                totals.append(total)
                role_sums.index_add_(0, self.role[rows].to(hidden.device), per_row)
            elif apart:
                total = _nothing(hidden, weight, bias)
            if apart:
                role_losses[term.roles[0]] = total / self.divisor
        if role_losses:
            loss = torch.stack(list(role_losses.values())).sum()
        else:
            loss = torch.stack(totals or [_nothing(hidden, weight, bias)]).sum() / self.divisor
        return StepResult(loss, role_sums, role_losses)

    def _run(
        self,
        term: Term,
        rows: Tensor,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: TeacherRows | TeacherTopK | None,
    ) -> tuple[Tensor, Tensor]:
        """One call: weighted sum over rows, and the unweighted loss of each row."""
        loss, index, options = find(term.loss), rows.to(hidden.device), dict(term.options)
        configs, transform = self.objectives.configs, self.objectives.transform
        weight_R = torch.tensor([configs[r].weight if r in term.roles else 0.0 for r in ROLES])
        student = Side(hidden.index_select(0, index), weight, bias, transform)
        other: Side | TopK | None = None
        if loss.teacher and isinstance(teacher, TeacherTopK):
            assert term.loss == "topk_kl", f"{term.loss} needs the teacher's hidden rows"
            other = teacher.at(index, options.pop("k", None))
        elif loss.teacher:
            assert isinstance(teacher, TeacherRows), f"{term.loss} needs the teacher's rows"
            head = (weight, bias) if teacher.weight is None else (teacher.weight, teacher.bias)
            constant = [None if tensor is None else tensor.detach() for tensor in head]
            theirs = teacher.hidden.to(hidden.device).index_select(0, index)
            other = Side(theirs, constant[0], constant[1], self.objectives.teacher_transform)
        known = Rows(
            self.target[rows].to(hidden.device),
            weight_R[self.role[rows]].to(hidden.device),
            self.sequence[rows],
        )
        return run(loss, options, student, other, known, self.objectives.chunk_bytes)


def _nothing(*tensors: Tensor | None) -> Tensor:
    """Zero, as a function of whatever trains.

    Sharded, all ranks go through as many backward passes, whoever has rows that count: the others
    wait for a gradient of each parameter, if it is zero.
    """
    zeros = [0 * t.sum() for t in tensors if t is not None and t.requires_grad]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())


def _member_R(roles: Collection[Role]) -> Tensor:
    """True for the roles given, in the order of ``ROLES``."""
    return torch.tensor([role in roles for role in ROLES])


def _group(configs: Mapping[Role, ObjectiveConfig], apart: Collection[Role]) -> tuple[Term, ...]:
    """Roles by loss and options, in the order of ``ROLES``; those apart by themselves."""
    groups: dict[tuple[Any, ...], list[Role]] = {}
    for role in ROLES:
        if role not in configs:
            continue
        config = configs[role]
        check_options(role, config)
        alone = role if role in apart else None
        groups.setdefault((alone, config.loss, *sorted(config.options.items())), []).append(role)
    return tuple(
        Term(loss=key[1], options=dict(key[2:]), roles=tuple(roles))
        for key, roles in groups.items()
    )


def check_options(role: Role, config: ObjectiveConfig) -> None:
    """Refuse what is no argument of the loss, or the trainer's own, or no value that it takes.

    Args:
        role: whose objective it is.
        config: the loss and its options.

    Raises:
        UserError: naming the option.
    """
    check_loss_options(f"objectives.{role}.options", config.loss, config.options)


def check_loss_options(where: str, loss_name: str, options: Mapping[str, Any]) -> None:
    """Refuse what is no argument of the loss, or common to all losses, or no value that it takes.

    Args:
        where: what the user knows the options by.
        loss_name: whose they are.
        options: by name.

    Raises:
        UserError: naming the option.
    """
    loss = find(loss_name)
    known = list(loss.options())
    for name in options:
        if name not in known:
            hint = nearest(name, known) if known else "leave options out"
            raise UserError(f"{where}: got {name!r}, which is no option of {loss_name}; {hint}")
    try:  # the loss itself knows which values it takes
        rows, head, none = torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1)
        target = none.long()
        if loss.reads == "layer":
            loss.function(rows, rows, **options)
        elif loss.reads == "likelihood":
            loss.function(Answers.of(none, none, target), **options)
        else:
            loss.function(*(rows, head) * (1 + loss.teacher), target, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None

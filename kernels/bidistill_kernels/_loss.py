"""What every public loss shares: its options, the checks, the call of the operation, reduction."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from typing_extensions import TypedDict

from bidistill_kernels import _ops
from bidistill_kernels._checks import (
    Side,
    check_backend,
    check_choice,
    check_number,
    check_tensors,
)
from bidistill_kernels._rows import ROW_LOSSES
from bidistill_kernels.transform import LogitTransform

# Logits of both models that exist at a time: on CPU more than 64 MiB gains a few per cent, a
# quarter of it loses a third (kernels/README.md#traffic); an accelerator needs 1024 rows to be busy
_CHUNK_BYTES = {"cpu": 64 << 20}
_CHUNK_BYTES_ELSEWHERE = 1 << 30
_IDENTITY = LogitTransform()


class Stats(NamedTuple):
    """Detached per-token results, shape (N,) each; 0 at ignored and zero-weight rows.

    None where the loss has no such number: a one-sided loss no teacher's, push-pull on raw logits
    no log-sum-exp.
    """

    per_token: Float[Tensor, "N"]
    """Loss before weighting and reduction, in the loss's own unit."""
    student_lse: Float[Tensor, "N"] | None = None
    """Log-sum-exp of the student's final logits, nats."""
    teacher_lse: Float[Tensor, "N"] | None = None
    """Log-sum-exp of the teacher's final logits, nats."""
    forward_kl: Float[Tensor, "N"] | None = None
    """KL(teacher || student), nats; whatever its weight in the loss."""
    reverse_kl: Float[Tensor, "N"] | None = None
    """KL(student || teacher), nats; whatever its weight in the loss."""


# Tensor, or with return_stats a pair (Tensor, Stats): spelled as a union, a type checker would
# refuse loss.backward()
Output: TypeAlias = Any


class RowOptions(TypedDict, total=False):
    """Keyword options of every loss."""

    student_transform: LogitTransform
    """Scale, soft-cap, temperature and vocabulary limit of the student's logits."""
    token_weight: Float[Tensor, "N"] | None
    """Weight of each row, a constant; rows of weight 0 are left out and cost nothing."""
    ignore_index: int
    """Rows with this target (default -100) are left out and cost nothing."""
    reduction: Literal["mean", "sum", "none"]
    """"mean" (default): weighted sum / `num_items`. "none": weighted loss of each row, which costs
    a second projection in backward; the others compute their gradient in forward."""
    num_items: float | Tensor | None
    """Divisor of "mean": the global number of rows under gradient accumulation or data
    parallelism. Default: the sum of the weights of the rows that count."""
    chunk_bytes: int | None
    """Upper bound on the fp32 logits that exist at a time. Default: 64 MiB on CPU, else 1 GiB."""
    backend: Literal["auto", "torch"]
    """Who computes; one named explicitly never falls back to another."""
    return_stats: bool
    """Return (loss, `Stats`) instead of the loss alone."""


class PairOptions(RowOptions, total=False):
    """Keyword options of a loss between two models."""

    teacher_transform: LogitTransform
    """Scale, soft-cap, temperature and vocabulary limit of the teacher's logits."""


class LinearRowOptions(RowOptions, total=False):
    """Keyword options of a one-model loss fused with its head."""

    student_bias: Float[Tensor, "V"] | None
    """Bias of the student's head."""


class LinearPairOptions(PairOptions, total=False):
    """Keyword options of a loss between two models fused with their heads."""

    student_bias: Float[Tensor, "V"] | None
    """Bias of the student's head."""
    teacher_bias: Float[Tensor, "V"] | None
    """Bias of the teacher's head; -inf masks an id."""


def fused_loss(
    loss: str,
    params: list[float],
    student: tuple[Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None] | None,
    target: Integer[Tensor, "N"] | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = _IDENTITY,
    teacher_transform: LogitTransform = _IDENTITY,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Output:
    """Check, call the operation and reduce; a model is (hidden, weight), or (logits, None)."""
    check_backend(backend)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items: got one with reduction={reduction!r}, expected 'mean'")
    pupil = Side("student", *student, student_bias, student_transform)
    tutor = None
    if teacher is not None:
        tutor = Side("teacher", *teacher, teacher_bias, teacher_transform)
    elif teacher_bias is not None or teacher_transform != _IDENTITY:
        raise TypeError(f"teacher_transform: got one, expected none; {loss} has no teacher")
    check_tensors(pupil, tutor, target, token_weight)
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES.get(pupil.hidden.device.type, _CHUNK_BYTES_ELSEWHERE)
    check_number("chunk_bytes", chunk_bytes, 1, whole=True)

    weight_N = _row_weight(pupil.hidden, target, token_weight, ignore_index)
    if reduction == "mean":
        weight_N = weight_N / _divisor(weight_N, num_items)
    inputs = _inputs(loss, params, pupil, tutor, target, weight_N, chunk_bytes)
    if reduction == "none":
        per_token_N, stats_SN = _ops.lm_head_rows(*inputs)
        result = per_token_N * weight_N
    else:
        result, per_token_N, stats_SN, *_ = _ops.lm_head_loss(*inputs)
    if not return_stats:
        return result
    named = dict(zip(ROW_LOSSES[loss].stats, stats_SN.detach().unbind(), strict=True))
    return result, Stats(per_token_N.detach(), **named)


def _row_weight(
    hidden: Tensor, target: Tensor | None, token_weight: Tensor | None, ignore_index: int
) -> Tensor:
    """Weight of each row, 0 where the target says so, in the dtype of the computation."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight_N = hidden.new_ones(hidden.shape[0], dtype=dtype)
    if token_weight is not None:
        weight_N = token_weight.detach().to(dtype)
    return weight_N if target is None else weight_N.masked_fill(target == ignore_index, 0)


def _divisor(weight_N: Tensor, num_items: float | Tensor | None) -> float | Tensor:
    if num_items is not None:
        return num_items
    total = weight_N.sum()
    return torch.where(total == 0, 1, total)  # nothing counts: the mean of nothing is 0 here


def _inputs(
    loss: str,
    params: list[float],
    student: Side,
    teacher: Side | None,
    target: Tensor | None,
    row_weight: Tensor,
    chunk_bytes: int,
) -> _ops.Inputs:
    """Flatten everything into the operations' inputs."""
    parts = student[1:4]
    wants = torch.is_grad_enabled()
    needs = [wants and x is not None and x.requires_grad for x in parts]
    others = (None, None, None) if teacher is None else teacher[1:4]
    transform = student.transform if teacher is None else teacher.transform
    packed = student.transform.pack(), transform.pack()
    return _ops.Inputs(
        *parts, *others, target, row_weight, loss, params, *packed, chunk_bytes, needs
    )


class LossModule(nn.Module):
    """A loss function as a module: options given to the constructor, tensors to `forward`."""

    function: ClassVar[Callable[..., Output]]

    def __init__(self, **options: object) -> None:
        """Keep the options; a call may override them."""
        super().__init__()
        self.options = options

    def forward(self, *tensors: Tensor, **options: object) -> Output:
        """Call the function with the module's options and the ones of this call."""
        return type(self).function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        """Show the options in the module's repr."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

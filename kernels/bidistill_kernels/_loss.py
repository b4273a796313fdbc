"""What every public loss shares: its options, the checks, the call of the operation, reduction."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from typing_extensions import TypedDict

from bidistill_kernels import _backends, _ops
from bidistill_kernels._checks import (
    Side,
    check_choice,
    check_num_items,
    check_number,
    check_tensors,
    check_top_k,
    check_weight,
)
from bidistill_kernels._parallel import parallel_loss, parallel_rows
from bidistill_kernels._rows import ROW_LOSSES, TopK
from bidistill_kernels._vocabulary import Part
from bidistill_kernels.transform import LogitTransform
from bidistill_kernels.vocab_parallel import VocabParallel, take_part

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
# (hidden, weight), or (logits,)
Model: TypeAlias = tuple[Tensor, Tensor | None] | tuple[Tensor]


class RowOptions(TypedDict, total=False):
    """Keyword options of every loss."""

    student_transform: LogitTransform
    """Scale, soft-cap, temperature and vocabulary limit of the student's logits."""
    token_weight: Float[Tensor, "N"] | None
    """Weight of each row, a constant; rows of weight 0 are left out and cost nothing."""
    ignore_index: int | None
    """Rows with this target (default -100) are left out and cost nothing. None: there are none,
    which, without `token_weight`, spares an accelerator the synchronisation of finding them."""
    reduction: Literal["mean", "sum", "none"]
    """"mean" (default): weighted sum / `num_items`. "none": weighted loss of each row; with a
    trained head it may cost a second projection in backward (kernels/README.md)."""
    num_items: float | Tensor | None
    """Divisor of "mean": the global number of rows under gradient accumulation or data
    parallelism. Default: the sum of the weights of the rows that count."""
    chunk_bytes: int | None
    """Upper bound on the fp32 logits that exist at a time. Default: 64 MiB on CPU, 88 MiB
    with the native library, 1 GiB elsewhere."""
    backend: Literal["auto", "torch", "triton", "native"]
    """Who computes; one named explicitly never falls back to another. "auto" takes Triton on CUDA
    and ROCm devices, the native library on CPU below fp64, and torch where these are absent."""
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
    vocab_parallel: VocabParallel | None
    """Heads and biases are this rank's rows of vocabulary-parallel ones. Everything else is the
    same on every rank of the group: hidden states, whose gradient is complete on each, targets,
    which are global ids, vocabulary limits, which count all ids, and the upstream gradient.
    Bidirectional KL, JSD and cross-entropy can."""


class LinearPairOptions(PairOptions, total=False):
    """Keyword options of a loss between two models fused with their heads."""

    student_bias: Float[Tensor, "V"] | None
    """Bias of the student's head."""
    teacher_bias: Float[Tensor, "V"] | None
    """Bias of the teacher's head; -inf masks an id, unless a soft-cap makes it finite."""
    vocab_parallel: VocabParallel | None
    """As in `LinearRowOptions`; both heads are cut at the same ids."""


def fused_loss(
    loss: str,
    params: list[float],
    student: Model,
    teacher: Model | TopK | None,
    target: Integer[Tensor, "N"] | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform = _IDENTITY,
    teacher_transform: LogitTransform = _IDENTITY,
    token_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
    vocab_parallel: VocabParallel | None = None,
) -> Output:
    """Check, call the operation and reduce; a model is (hidden, weight), (logits,) or a TopK."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_num_items(num_items, reduction)
    if ignore_index is not None:
        check_number("ignore_index", ignore_index, -(2**63), whole=True)
    pupil = _side("student", student, student_bias, student_transform)
    tutor, stored = None, None
    if isinstance(teacher, TopK):
        stored = teacher
    elif teacher is not None:
        tutor = _side("teacher", teacher, teacher_bias, teacher_transform)
        if tutor.weight is None and pupil.weight is not None:  # beside a head
            tutor = tutor._replace(given="probs")
    if tutor is None or tutor.given == "probs":
        _refuse_teacher_options(teacher_bias, teacher_transform)
    part = None
    if vocab_parallel is not None:
        pupil, tutor, part = take_part(vocab_parallel, loss, backend, pupil, tutor)
        backend = "torch"
    check_tensors(pupil, tutor, target, token_weight, part=part is not None)
    if stored is not None:
        check_top_k(stored, pupil)
    pupil, tutor = as_autocast(pupil), None if tutor is None else as_autocast(tutor)
    backend, chunk_bytes = settings(pupil.hidden, backend, chunk_bytes)

    weight_N = _row_weight(pupil.hidden, target, token_weight, ignore_index)
    all_rows = token_weight is None and (target is None or ignore_index is None)
    if reduction == "mean":
        weight_N = weight_N / _divisor(weight_N, num_items, all_rows=all_rows)
    others = (None, None, None) if tutor is None else tutor[1:4]
    packed = pupil.transform.pack(), (tutor or pupil).transform.pack()
    wants = torch.is_grad_enabled()
    needs = [wants and x is not None and x.requires_grad for x in pupil[1:4]]
    rows = None, target, weight_N, loss, params
    run = backend, chunk_bytes, all_rows, needs
    inputs = _ops.Inputs(*pupil[1:4], *others, *rows, *packed, *run)
    if stored is not None:
        inputs = inputs._replace(teacher_hidden=stored.values, teacher_ids=stored.ids)
    result, per_token_N, stats_SN = _call(inputs, reduction, part)
    if not return_stats:
        return result
    named = dict(zip(ROW_LOSSES[loss].stats, stats_SN.detach().unbind(), strict=True))
    return result, Stats(per_token_N.detach(), **named)


def _side(name: str, model: Model, bias: Tensor | None, transform: LogitTransform) -> Side:
    hidden, *weight = model
    if weight:
        check_weight(name, weight[0])
    return Side(name, hidden, weight[0] if weight else None, bias, transform)


def _refuse_teacher_options(bias: Tensor | None, transform: LogitTransform) -> None:
    why = "this teacher has no head: it is stored or given, or the loss has none"
    if bias is not None:
        raise TypeError(f"teacher_bias: got one, expected none; {why}")
    if transform is not _IDENTITY:
        raise TypeError(f"teacher_transform: got one, expected none; {why}")


def settings(hidden: Tensor, backend: str, chunk_bytes: int | None) -> tuple[str, int]:
    """Return the back-end and the bytes of a chunk that a call gets."""
    backend = _backends.resolve(backend, hidden.device, hidden.dtype)
    if chunk_bytes is None:
        chunk_bytes = _backends.sizes(backend, hidden.device.type).chunk_bytes
    check_number("chunk_bytes", chunk_bytes, 1, whole=True)
    return backend, chunk_bytes


def _call(inputs: _ops.Inputs, reduction: str, part: Part | None) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operation that fits: the reduced loss, per-row losses, statistics.

    The one for sums is needed only where dW must be summed before the upstream gradient is known.
    """
    by_rows = reduction == "none" or not any(inputs.needs[1:]) or inputs.keeps_slab()
    if not by_rows:
        results = parallel_loss(part, inputs) if part else _ops.lm_head_loss(*inputs)
        total, per_token_N, stats_SN, *_ = results
        return total, per_token_N, stats_SN
    results = parallel_rows(part, inputs) if part else _ops.lm_head_rows(*inputs)
    per_token_N, stats_SN, *_ = results
    if reduction == "none":
        return per_token_N * inputs.row_weight, per_token_N, stats_SN
    return torch.dot(per_token_N, inputs.row_weight), per_token_N, stats_SN


def as_autocast(side: Side) -> Side:
    """Cast what an accelerator multiplies as autocast would; logits stay fp32.

    On CPU 16-bit products gain nothing, and the tensors are used as they are. Autocast leaves fp64
    alone.
    """
    device, hidden = side.hidden.device.type, side.hidden
    if device == "cpu" or side.weight is None or not torch.is_autocast_enabled(device):
        return side
    if torch.float64 in (hidden.dtype, side.weight.dtype):
        return side
    dtype = torch.get_autocast_dtype(device)
    return side._replace(hidden=side.hidden.to(dtype), weight=side.weight.to(dtype))


def _row_weight(
    hidden: Tensor, target: Tensor | None, token_weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    """Weight of each row, 0 where the target says so, in the dtype of the computation."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight_N = hidden.new_ones(hidden.shape[0], dtype=dtype)
    if token_weight is not None:
        weight_N = token_weight.detach().to(dtype)
    if target is None or ignore_index is None:
        return weight_N
    return weight_N.masked_fill(target == ignore_index, 0)


def _divisor(
    weight_N: Tensor, num_items: float | Tensor | None, *, all_rows: bool
) -> float | Tensor:
    if isinstance(num_items, Tensor):
        return num_items.detach().to(weight_N.dtype)
    if num_items is not None:
        return num_items
    if all_rows:
        return max(1, weight_N.shape[0])
    total = weight_N.sum()
    return torch.where(total == 0, 1, total)  # nothing counts: the mean of nothing is 0 here


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

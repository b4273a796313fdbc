"""The table of operations: schema, fake and autograd formula of each; no kernels here.

bidistill::lm_head_loss  weighted sum of a loss over the rows, with its gradients, in one pass
bidistill::lm_head_rows  the loss of each row; backward runs lm_head_loss with the upstream
                         gradient as weights

Both serve every loss: `loss` names a row function of `_rows.ROW_LOSSES`, so a new loss needs no
new operation. Shapes: N tokens, S statistics of the loss.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import ROW_LOSSES
from bidistill_kernels.lm_head import Head, LossRows, Needs, run_chunks
from bidistill_kernels.transform import LogitTransform

_INPUTS = (
    "Tensor student_hidden, Tensor? student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? target, Tensor row_weight, str loss, float[] params, "
    "float[] student_transform, float[] teacher_transform, int chunk_bytes, bool[] needs"
)


class Inputs(NamedTuple):
    """The inputs of both operations, in the order of the schema."""

    student_hidden: Tensor  # (N, D), or logits (N, V) where student_weight is None
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher_hidden: Tensor | None  # None: the loss has no teacher
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    target: Tensor | None
    row_weight: Tensor  # (N,), 0 leaves the row out; fp32 or fp64, the dtype of the computation
    loss: str
    params: list[float]  # the loss's own numbers, in its own order
    student_transform: list[float]  # LogitTransform.pack()
    teacher_transform: list[float]
    chunk_bytes: int
    needs: list[bool]  # gradients of student_hidden, student_weight, student_bias


def _run(inputs: Inputs, needs: Needs) -> LossRows:
    """Build the heads that the flat inputs describe and run the driver."""
    transform = LogitTransform.unpack(inputs.student_transform)
    student, teacher = Head(*inputs[:3], transform), None
    if inputs.teacher_hidden is not None:
        teacher = Head(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_bias,
            LogitTransform.unpack(inputs.teacher_transform),
        )
    target, row_weight, loss, params = inputs[6:10]
    return run_chunks(student, teacher, target, row_weight, loss, params, needs, inputs.chunk_bytes)


@torch.library.custom_op(
    "bidistill::lm_head_loss",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def lm_head_loss(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Return the weighted sum, per-row losses, statistics (S, N), and the sum's dX, dW, dbias.

    Per-row results are unweighted and 0 where the weight is; gradients that `needs` does not ask
    for have size 0, the others have the dtype of the computation.
    """
    inputs = Inputs(*args)
    rows = _run(inputs, Needs(*inputs.needs))
    total = torch.dot(rows.loss_N, inputs.row_weight)
    gradients = rows.gradients
    dx_ND, dw_VD, dbias_V = gradients.hidden_ND, gradients.weight_VD, gradients.bias_V
    return total, rows.loss_N, rows.stats_SN, dx_ND, dw_VD, dbias_V


@lm_head_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    inputs = Inputs(*args)
    new = inputs.row_weight.new_empty
    primals = zip(inputs[:3], inputs.needs, strict=True)
    gradients = [new(x.shape) if need and x is not None else new(0) for x, need in primals]
    S, N = len(ROW_LOSSES[inputs.loss].stats), len(inputs.row_weight)
    return new(()), new(N), new(S, N), *gradients


@torch.library.custom_op(
    "bidistill::lm_head_rows", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def lm_head_rows(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Return the unweighted loss of each row, 0 where `row_weight` is, and statistics (S, N)."""
    rows = _run(Inputs(*args), Needs(hidden=False, weight=False, bias=False))
    return rows.loss_N, rows.stats_SN


@lm_head_rows.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    inputs = Inputs(*args)
    S, N = len(ROW_LOSSES[inputs.loss].stats), len(inputs.row_weight)
    return inputs.row_weight.new_empty(N), inputs.row_weight.new_empty(S, N)


def _returned(
    gradients: tuple[Tensor, ...], needs: list[bool], dtypes: list[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Arrange the first three inputs' gradients, in their dtype, as autograd wants them."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False; this loss has no second derivative. "
            "Use its *_reference function, which has one"
        )
    triples = zip(gradients, needs, dtypes, strict=True)
    first = [x.to(dtype) if need and dtype else None for x, need, dtype in triples]
    return *first, *[None] * (len(Inputs._fields) - len(first))


def _save(ctx: Any, inputs: tuple[Any, ...], *saved: Tensor | None) -> None:  # noqa: ANN401
    # autograd would fill a zero upstream gradient for every output, one as large as dW among them
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.needs = Inputs(*inputs).needs
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    _save(ctx, inputs, *output[3:])


def _backward_loss(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    if upstream is None:
        return (None,) * len(Inputs._fields)
    # out of place: the saved gradients must survive a second backward (retain_graph); and fp32
    # until here, so that a gradient scaler's factor comes before the rounding to 16 bits
    gradients = tuple(x * upstream for x in ctx.saved_tensors)
    return _returned(gradients, ctx.needs, ctx.dtypes)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    _save(ctx, inputs, *inputs[:8])
    ctx.settings = inputs[8:]


def _backward_rows(ctx: Any, upstream_N: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    if upstream_N is None:
        return (None,) * len(Inputs._fields)
    *tensors, row_weight_N = ctx.saved_tensors
    weight_N = torch.where(row_weight_N == 0, 0, upstream_N)
    _, _, _, *gradients = lm_head_loss(*tensors, weight_N, *ctx.settings)
    return _returned(tuple(gradients), ctx.needs, ctx.dtypes)


lm_head_loss.register_autograd(_backward_loss, setup_context=_save_loss)
lm_head_rows.register_autograd(_backward_rows, setup_context=_save_rows)

"""The table of operations: schema, fake and autograd formula of each; no kernels here.

bidistill::lm_head_rows       the loss of each row and all that its gradients need; backward weighs
                              with the upstream gradient
bidistill::lm_head_loss       weighted sum of a dense loss over the rows with its gradients, for
                              trained heads whose logit gradient is too large to be kept
bidistill::lm_head_gradients  the head's gradients from what lm_head_rows kept; no autograd

All serve every loss: `loss` names a row function of `_rows.ROW_LOSSES`, so a new loss needs no new
operation. Shapes: N tokens, S statistics of the loss, V vocabulary, D width, K ids a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidistill_kernels import lm_head
from bidistill_kernels._head import (
    Head,
    LossRows,
    Needs,
    Plan,
    gradient_dtype,
    keeps_slab,
    slab_shape,
)
from bidistill_kernels._head_gradients import head_gradients
from bidistill_kernels._rows import ROW_LOSSES, TopK
from bidistill_kernels.transform import LogitTransform

_INPUTS = (
    "Tensor student_hidden, Tensor? student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_ids, "
    "Tensor? target, Tensor row_weight, str loss, float[] params, "
    "float[] student_transform, float[] teacher_transform, "
    "str backend, int chunk_bytes, bool all_rows, bool[] needs"
)


class Inputs(NamedTuple):
    """The inputs of the operations, in the order of the schema."""

    student_hidden: Tensor  # (N, D), or logits (N, V) where student_weight is None
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher_hidden: Tensor | None  # None: the loss has no teacher
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_ids: Tensor | None  # (N, K) of a stored teacher, whose values are teacher_hidden
    target: Tensor | None
    row_weight: Tensor  # (N,), 0 leaves the row out; fp32 or fp64, the dtype of the computation
    loss: str
    params: list[float]  # the loss's own numbers, in its own order
    student_transform: list[float]  # LogitTransform.pack()
    teacher_transform: list[float]
    backend: str  # "torch" or "triton"
    chunk_bytes: int
    all_rows: bool  # promise that no row_weight is 0
    needs: list[bool]  # gradients of student_hidden, student_weight, student_bias

    def student(self) -> Head:
        """Return the student's side."""
        return Head(*self[:3], LogitTransform.unpack(self.student_transform))

    def teacher(self) -> Head | TopK | None:
        """Return the teacher's side, if the loss has one."""
        if self.teacher_hidden is None:
            return None
        if self.teacher_ids is not None:
            return TopK(self.teacher_ids, self.teacher_hidden)
        transform = LogitTransform.unpack(self.teacher_transform)
        return Head(self.teacher_hidden, self.teacher_weight, self.teacher_bias, transform)

    def keeps_slab(self) -> bool:
        """Tell whether lm_head_rows keeps the gradient of the logits."""
        return keeps_slab(*self[:2], self.loss, Needs(*self.needs), self.backend)

    def plan(self, *, weigh: bool) -> Plan:
        """Return the driver's plan."""
        return Plan(self.backend, self.chunk_bytes, self.all_rows, weigh)


def _run(inputs: Inputs, *, weigh: bool) -> LossRows:
    sides = inputs.student(), inputs.teacher(), inputs.target, inputs.row_weight
    needs, plan = Needs(*inputs.needs), inputs.plan(weigh=weigh)
    return lm_head.run_chunks(*sides, inputs.loss, inputs.params, needs, plan)


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
    rows = _run(inputs, weigh=True)
    total = torch.dot(rows.loss_N, inputs.row_weight)
    if inputs.needs[0]:
        rows.hidden_ND.mul_(inputs.row_weight[:, None])
    return total, rows.loss_N, rows.stats_SN, rows.hidden_ND, rows.weight_VD, rows.bias_V


@lm_head_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    inputs = Inputs(*args)
    new = inputs.row_weight.new_empty
    primals = zip(inputs[:3], inputs.needs, strict=True)
    gradients = [new(x.shape) if need and x is not None else new(0) for x, need in primals]
    S, N = len(ROW_LOSSES[inputs.loss].stats), inputs.row_weight.shape[0]
    return new(()), new(N), new(S, N), *gradients


@torch.library.custom_op(
    "bidistill::lm_head_rows",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def lm_head_rows(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Return the loss of each row, statistics (S, N), dX of each row, and the kept slab and ids.

    Everything is unweighted, and 0 where `row_weight` is; what is not needed has size 0.
    """
    rows = _run(Inputs(*args), weigh=False)
    return rows.loss_N, rows.stats_SN, rows.hidden_ND, rows.slab_NV, rows.ids_NK


@lm_head_rows.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    inputs = Inputs(*args)
    new, student = inputs.row_weight.new_empty, inputs.student()
    S, N = len(ROW_LOSSES[inputs.loss].stats), inputs.row_weight.shape[0]
    hidden = new(inputs.student_hidden.shape) if inputs.needs[0] else new(0)
    slab, ids = new(0), new(0, dtype=torch.int64)
    if inputs.keeps_slab():
        shape = slab_shape(student, inputs.teacher(), inputs.loss, inputs.params)
        if ROW_LOSSES[inputs.loss].width is None:
            dtype = gradient_dtype(student, inputs.backend, inputs.row_weight.dtype)
            slab = new(shape, dtype=dtype)
        else:
            slab, ids = new(shape), new(shape, dtype=torch.int64)
    return new(N), new(S, N), hidden, slab, ids


@torch.library.custom_op(
    "bidistill::lm_head_gradients",
    mutates_args=(),
    schema=f"(Tensor slab, Tensor ids, Tensor upstream, {_INPUTS}) -> (Tensor, Tensor)",
)
def lm_head_gradients(
    slab: Tensor,
    ids: Tensor,
    upstream: Tensor,
    *args: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    """Return dW and dbias of the rows weighed by `upstream`, in the dtypes of head and bias."""
    inputs = Inputs(*args)
    needs, plan = Needs(*inputs.needs), inputs.plan(weigh=False)
    student, kept = inputs.student(), (slab, ids)
    return head_gradients(student, kept, inputs.row_weight, upstream, needs, plan)


@lm_head_gradients.register_fake
def _(slab: Tensor, ids: Tensor, upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    inputs = Inputs(*args)
    primals = zip(inputs[1:3], inputs.needs[1:], strict=True)
    empty = upstream.new_empty
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if need and x is not None
        else empty(0)
        for x, need in primals
    )


_NONE = (None,) * len(Inputs._fields)


def _save(ctx: Any, inputs: tuple[Any, ...], *saved: Tensor | None) -> None:  # noqa: ANN401
    # autograd would fill a zero upstream gradient for every output, one as large as dW among them
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    named = Inputs(*inputs)
    ctx.needs = named.needs
    ctx.dtypes = [None if x is None else x.dtype for x in named[:3]]


def _returned(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Arrange the first three inputs' gradients, in their dtype, as autograd wants them."""
    triples = zip(gradients, ctx.needs, ctx.dtypes, strict=True)
    first = [x.to(dtype) if need and dtype else None for x, need, dtype in triples]
    return *first, *_NONE[3:]


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False; this loss has no second derivative. "
            "Use its *_reference function, which has one"
        )


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    _save(ctx, inputs, *output[3:])


def _backward_loss(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    if upstream is None:
        return _NONE
    _refuse_second_derivative()
    # out of place: the saved gradients must survive a second backward (retain_graph); and fp32
    # until here, so that a gradient scaler's factor comes before the rounding to 16 bits
    return _returned(ctx, tuple(x * upstream for x in ctx.saved_tensors))


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    named = Inputs(*inputs)
    ctx.keeps = named.keeps_slab()
    # without a slab the head's gradients need all of the inputs once more
    ctx.again = not ctx.keeps and (named.needs[1] or named.needs[2])
    # of the inputs, the head's gradients from a slab need the student's and the weights
    first = named[:9] if ctx.again else (*named[:3], *(None,) * 5, named.row_weight)
    if not (ctx.keeps or ctx.again):
        first = (None,) * 8 + (named.row_weight,)
    _save(ctx, inputs, *first, *output[2:])
    ctx.settings = named[9:-1]


def _backward_rows(ctx: Any, upstream_N: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    if upstream_N is None:
        return _NONE
    _refuse_second_derivative()
    *tensors, row_weight_N, dx_ND, slab, ids = ctx.saved_tensors
    # rows that were left out are constants, whatever the upstream gradient holds there
    upstream_N = torch.where(row_weight_N == 0, 0, upstream_N)
    dx_ND = dx_ND * upstream_N[:, None] if ctx.needs[0] else dx_ND
    head = (upstream_N, upstream_N)
    needs = [False, *ctx.needs[1:]]
    if ctx.again:
        inputs = (*tensors, upstream_N, *ctx.settings, needs)
        head = lm_head_loss(*inputs)[4:]
    elif ctx.keeps:
        inputs = (*tensors, row_weight_N, *ctx.settings, needs)
        head = lm_head_gradients(slab, ids, upstream_N, *inputs)
    return _returned(ctx, (dx_ND, *head))


lm_head_loss.register_autograd(_backward_loss, setup_context=_save_loss)
lm_head_rows.register_autograd(_backward_rows, setup_context=_save_rows)

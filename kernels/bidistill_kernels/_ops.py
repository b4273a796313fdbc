"""The table of operations: schema, fake and autograd formula of each; no kernels here.

bidistill::lm_head_rows       the loss of each row and all that its gradients need; backward weighs
                              with the upstream gradient
bidistill::lm_head_loss       weighted sum of a dense loss over the rows with its gradients, for
                              trained heads whose logit gradient is too large to be kept
bidistill::lm_head_gradients  the head's gradients from what lm_head_rows kept; no autograd
bidistill::top_log_probs      a teacher's best ids and their log-probabilities; no autograd

The first three serve every loss: `loss` names a row function of `_rows.ROW_LOSSES`, so a new loss
needs no new operation. Shapes: N tokens, S statistics of the loss, V vocabulary, D width, K ids a
row.
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
from bidistill_kernels._head_gradients import Kept, Shape, head_gradients
from bidistill_kernels._rows import ROW_LOSSES, TopK
from bidistill_kernels._vocabulary import WHOLE, Vocabulary
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
    backend: str  # resolved, never "auto"
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

    def run(self, *, weigh: bool, vocabulary: Vocabulary = WHOLE) -> LossRows:
        """Run the driver."""
        sides = self.student(), self.teacher(), self.target, self.row_weight
        plan = Plan(self.backend, self.chunk_bytes, self.all_rows, weigh, vocabulary)
        return lm_head.run_chunks(*sides, self.loss, self.params, Needs(*self.needs), plan)


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
    rows = inputs.run(weigh=True)
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
    rows = Inputs(*args).run(weigh=False)
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
    schema=(
        "(Tensor slab, Tensor ids, Tensor hidden, Tensor row_weight, Tensor scale, "
        "int[] weight_size, ScalarType weight_dtype, int[] bias_size, ScalarType bias_dtype, "
        "int vocab, bool sparse, str backend, bool all_rows) -> (Tensor, Tensor)"
    ),
)
def lm_head_gradients(
    slab: Tensor,
    ids: Tensor,
    hidden: Tensor,
    row_weight: Tensor,
    scale: Tensor,
    weight_size: list[int],
    weight_dtype: torch.dtype,
    bias_size: list[int],
    bias_dtype: torch.dtype,
    *settings: Any,  # noqa: ANN401
) -> tuple[Tensor, ...]:
    """Return dW and dbias of the rows weighed by `scale`; an empty size stands for not needed."""
    kept = Kept(slab, ids, hidden, row_weight, *settings)
    weight = Shape(weight_size, weight_dtype) if weight_size else None
    bias = Shape(bias_size, bias_dtype) if bias_size else None
    return head_gradients(kept, scale, weight, bias)


@lm_head_gradients.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    scale, (weight_size, weight_dtype, bias_size, bias_dtype) = args[4], args[5:9]
    new = scale.new_empty
    dw = new(weight_size, dtype=weight_dtype) if weight_size else new(0)
    return dw, new(bias_size, dtype=bias_dtype) if bias_size else new(0)


@torch.library.custom_op(
    "bidistill::top_log_probs",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor? weight, Tensor? bias, int k, float[] transform, str backend, "
        "int chunk_bytes) -> (Tensor, Tensor)"
    ),
)
def top_log_probs(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    k: int,
    transform: list[float],
    backend: str,
    chunk_bytes: int,
) -> tuple[Tensor, ...]:
    """Return the k best ids of each row and their log-probabilities, (N, k); constants."""
    head, dtype = Head(hidden, weight, bias, LogitTransform.unpack(transform)), _computed(hidden)
    return tuple(lm_head.best_ids(head, k, dtype, backend, chunk_bytes))


@top_log_probs.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    shape = hidden.shape[0], k
    dtype = _computed(hidden)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=dtype)


def _computed(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


NONE = (None,) * len(Inputs._fields)


def save(ctx: Any, inputs: Inputs, *saved: Tensor | None) -> None:  # noqa: ANN401
    """Keep tensors for backward, and what `returned` needs to know of the inputs."""
    # autograd would fill a zero upstream gradient for every output, one as large as dW among them
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved)
    ctx.needs = inputs.needs
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def returned(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Arrange the first three inputs' gradients, in their dtype, as autograd wants them."""
    triples = zip(gradients, ctx.needs, ctx.dtypes, strict=True)
    first = [x.to(dtype) if need and dtype else None for x, need, dtype in triples]
    return *first, *NONE[3:]


def refuse_second_derivative() -> None:
    """Refuse a backward that should have one of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: got True, expected False; this loss has no second derivative. "
            "Use its *_reference function, which has one"
        )


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    save(ctx, Inputs(*inputs), *output[3:])


def backward_loss(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    """Multiply the saved gradients of a sum by its upstream gradient."""
    if upstream is None:
        return NONE
    refuse_second_derivative()
    # fp32 until here, so that a gradient scaler's factor comes before the rounding to 16 bits
    return returned(ctx, tuple(scaled(x, upstream) for x in ctx.saved_tensors))


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """Multiply a saved gradient, in its own memory if nobody can ask for it again.

    A copy of dW would be the largest thing in memory, one of dX with a frozen head.
    """
    # torch gives a saved output its node again, which would make the gradient need one
    saved = saved.detach()
    # a second backward (retain_graph) can; a compiler, whose tensors are of other types, plans
    # memory itself; and of a batch of upstream gradients each needs a result of its own
    functorch: Any = torch._C._functorch  # pyright: ignore
    batched = functorch.is_batchedtensor(factor) or functorch.is_legacy_batchedtensor(factor)
    again = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
    if again or batched or type(factor) is not Tensor:
        return saved * factor
    if factor.is_cpu and factor.numel() == 1 and factor.item() == 1:
        return saved
    return saved.mul_(factor)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    named = Inputs(*inputs)
    student = named.student()
    ctx.keeps = named.keeps_slab()
    # without a slab the head's gradients need all of the inputs once more
    ctx.again = not ctx.keeps and (named.needs[1] or named.needs[2])
    tensors = named[:8] if ctx.again else (student.hidden_ND if ctx.keeps else None,) + (None,) * 7
    save(ctx, named, *tensors, named.row_weight, *output[2:])
    ctx.settings = named[9:-1]
    # from a slab they need of head and bias the shapes alone
    ctx.sizes = [[] if x is None else list(x.shape) for x in named[1:3]]
    ctx.factor, sparse = student.transform.factor, ROW_LOSSES[named.loss].width is not None
    ctx.kept = student.vocab, sparse, named.backend, named.all_rows


def _backward_rows(ctx: Any, upstream_N: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
    if upstream_N is None:
        return NONE
    refuse_second_derivative()
    *tensors, row_weight_N, dx_ND, slab, ids = ctx.saved_tensors
    needs = ctx.needs
    # rows that were left out are constants, whatever the upstream gradient holds there
    upstream_N = torch.where(row_weight_N == 0, 0, upstream_N)
    dx_ND = scaled(dx_ND, upstream_N[:, None]) if needs[0] else dx_ND
    head = (upstream_N, upstream_N)
    if ctx.again and (needs[1] or needs[2]):
        head = lm_head_loss(*tensors, upstream_N, *ctx.settings, [False, *needs[1:]])[4:]
    elif ctx.keeps and (needs[1] or needs[2]):
        shapes: list[Any] = []
        for size, dtype, need in zip(ctx.sizes, ctx.dtypes[1:], needs[1:], strict=True):
            shapes += [size if need else [], dtype or upstream_N.dtype]
        rows = slab, ids, tensors[0], row_weight_N, upstream_N * ctx.factor
        head = lm_head_gradients(*rows, *shapes, *ctx.kept)
    return returned(ctx, (dx_ND, *head))


lm_head_loss.register_autograd(backward_loss, setup_context=_save_loss)
lm_head_rows.register_autograd(_backward_rows, setup_context=_save_rows)

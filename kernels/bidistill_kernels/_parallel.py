"""What the operations lm_head_loss and lm_head_rows are where each rank has a part of the head.

They are autograd functions, not custom operations: those take neither a process group nor, in a
compiled graph, a place in the order of the collectives. A compiler leaves them out of its graph
(torch.compiler.disable, by the name that does not import the compiler to say so).
Row sums are completed a chunk at a time inside the driver, the gradient of the hidden states once,
here; the gradients of head and bias are those of this rank's rows. Every rank must make the same
calls, with the same rows and the same upstream gradient. Shapes as in `_ops.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bidistill_kernels import _ops
from bidistill_kernels._head import LossRows
from bidistill_kernels._vocabulary import Part


def _run(part: Part, inputs: _ops.Inputs, *, weigh: bool) -> LossRows:
    rows = inputs.run(weigh=weigh, vocabulary=part)
    if inputs.needs[0]:
        dist.all_reduce(rows.hidden_ND, group=part.group)
    return rows


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        inputs = _ops.Inputs(*args)
        rows = _run(part, inputs, weigh=True)
        if inputs.needs[0]:
            rows.hidden_ND.mul_(inputs.row_weight[:, None])
        _ops.save(ctx, inputs, rows.hidden_ND, rows.weight_VD, rows.bias_V)
        ctx.mark_non_differentiable(rows.loss_N, rows.stats_SN)
        return torch.dot(rows.loss_N, inputs.row_weight), rows.loss_N, rows.stats_SN

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        return None, *_ops.backward_loss(ctx, upstream)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        inputs = _ops.Inputs(*args)
        rows = _run(part, inputs, weigh=False)
        # the sums dW and dbias need the upstream gradient, and so all of the inputs once more
        again = inputs[:8] if any(inputs.needs[1:]) else (None,) * 8
        _ops.save(ctx, inputs, *again, inputs.row_weight, rows.hidden_ND)
        ctx.part, ctx.settings = part, inputs[9:-1]
        ctx.mark_non_differentiable(rows.stats_SN)
        return rows.loss_N, rows.stats_SN

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:  # noqa: ANN401
        if upstream_N is None:
            return None, *_ops.NONE
        _ops.refuse_second_derivative()
        *tensors, row_weight_N, dx_ND = ctx.saved_tensors
        need_hidden, *need_head = ctx.needs
        # rows that were left out are constants, whatever the upstream gradient holds there
        upstream_N = torch.where(row_weight_N == 0, 0, upstream_N)
        head = upstream_N, upstream_N
        if any(need_head):
            args: Any = *tensors, upstream_N, *ctx.settings, [False, *need_head]
            rows = _run(ctx.part, _ops.Inputs(*args), weigh=True)
            head = rows.weight_VD, rows.bias_V
        dx_ND = _ops.scaled(dx_ND, upstream_N[:, None]) if need_hidden else dx_ND
        return None, *_ops.returned(ctx, (dx_ND, *head))


@torch._disable_dynamo  # pyright: ignore
def parallel_loss(part: Part, inputs: _ops.Inputs) -> tuple[Tensor, ...]:
    """Return the weighted sum over rows, the loss of each, and statistics (S, N)."""
    return _Loss.apply(part, *inputs)  # pyright: ignore


@torch._disable_dynamo  # pyright: ignore
def parallel_rows(part: Part, inputs: _ops.Inputs) -> tuple[Tensor, ...]:
    """Return the loss of each row, and statistics (S, N)."""
    return _Rows.apply(part, *inputs)  # pyright: ignore

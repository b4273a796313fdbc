"""What the fused losses hold while they run, which no mode sees: by the driver's own rules.

Shapes: C rows of a chunk, V vocabulary, D width of a model.
"""

from typing import Any

import torch
from torch import Tensor

from bidistill_kernels import _backends
from bidistill_kernels._head import gradient_dtype, padded
from bidistill_kernels._ops import Inputs
from bidistill_kernels._products import SLAB_ROWS
from bidistill_kernels._rows import ROW_LOSSES
from bidistill_kernels.lm_head import _chunk_rows

COMPANIONS = 5
"""Tables of a block's size that a row function on PyTorch holds at its peak."""
GATHERED = 8
"""Tables of a chunk's ids that a loss which gathers, on any back-end, holds at its peak."""


def scratch_bytes(func: Any, args: tuple[Any, ...]) -> int:  # noqa: ANN401
    """Bytes that an operation of the losses takes and gives back, beside what it returns.

    Args:
        func: one of ``torch.ops.bidistill``; others than the two losses and the choice of a
            teacher's best ids take none.
        args: its arguments; fake tensors will do.
    """
    if func is torch.ops.bidistill.top_log_probs.default:
        return _choice_bytes(*args)
    sums = func is torch.ops.bidistill.lm_head_loss.default
    if not sums and func is not torch.ops.bidistill.lm_head_rows.default:
        return 0
    inputs = Inputs(*args)
    student, dtype = inputs.student(), inputs.row_weight.dtype
    weight, hidden = student.weight_VD, student.hidden_ND
    assert weight is not None, "the trainer's losses have a head"
    N, D = len(hidden), hidden.shape[1]
    if ROW_LOSSES[inputs.loss].gathers and inputs.teacher_ids is not None:
        row = inputs.teacher_ids.shape[1] * dtype.itemsize
        return GATHERED * min(N * row, max(row, inputs.chunk_bytes))
    heads = 1 + (inputs.teacher_hidden is not None and inputs.teacher_ids is None)
    row = padded(student.vocab) * dtype.itemsize
    C = min(N, _chunk_rows(N, max(1, inputs.chunk_bytes // (row * heads))))
    sizes = _backends.sizes(inputs.backend, hidden.device.type)
    # operands that do not multiply as they are: rows of the chunk, and a piece of the head
    plain = inputs.backend == "triton" or weight.dtype == dtype
    piece = 0 if plain else min(SLAB_ROWS, student.vocab) * D * dtype.itemsize
    cast = 0 if hidden.dtype == dtype or plain else dtype.itemsize
    project = heads * C * D * (hidden.dtype.itemsize + cast) + piece
    function = 0
    if inputs.backend == "torch":
        function = COMPANIONS * min(C * row, max(row, sizes.block_bytes))
    back = 2 * C * D * dtype.itemsize + piece if any(inputs.needs) else 0
    slab = 0
    if sums and inputs.needs[1]:
        slab_row = padded(student.vocab) * gradient_dtype(student, inputs.backend, dtype).itemsize
        chunks = sizes.slab_bytes // (C * slab_row)
        slab = min(chunks * C, N) * slab_row if chunks > 1 else 0
    return C * row * heads + slab + max(project, function, back)


def _choice_bytes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    transform: list[float],
    backend: str,
    chunk_bytes: int,
) -> int:
    """Of a teacher's best ids: a chunk of logits, and what makes and reads it."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    N, D, V = len(hidden), hidden.shape[1], len(weight)
    row = padded(V) * dtype.itemsize
    C = min(N, _chunk_rows(N, max(1, chunk_bytes // row)))
    plain = backend == "triton" or weight.dtype == dtype
    piece = 0 if plain else min(SLAB_ROWS, V) * D * dtype.itemsize
    cast = 0 if hidden.dtype == dtype or plain else dtype.itemsize
    project = C * D * (hidden.dtype.itemsize + cast) + piece
    # elsewhere the largest table is the mask of ids that tie for the last place
    choose = COMPANIONS * C * row if backend == "torch" else C * V
    return C * row + max(project, choose)

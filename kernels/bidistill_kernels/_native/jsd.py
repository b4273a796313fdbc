"""Generalised Jensen-Shannon divergence, per row of logits.

Three sweeps; the second leaves p_s and log(m / p_s) in the place of gradient and teacher, and the
third only multiplies them. 4 exp and a logarithm an id. See kernels/csrc/rows.hpp.
"""

from collections.abc import Sequence

from bidistill_kernels._native.logits import run_rows
from bidistill_kernels._rows import Chunk, RowResult


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.jsd`."""
    loss_C, *stats = run_rows("bd_jsd_f32", chunk, 3, *params)
    return RowResult(loss_C, tuple(stats))

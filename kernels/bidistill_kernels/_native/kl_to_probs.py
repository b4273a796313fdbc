"""KL to given probabilities, per row of logits.

Both rows are swept twice, for statistics and for loss and gradient; 2 exp and a logarithm an id, or
1 exp without gradient. See kernels/csrc/rows.hpp.
"""

from collections.abc import Sequence

from bidistill_kernels._native.logits import run_rows
from bidistill_kernels._rows import Chunk, RowResult


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.linear_kl_to_probs`."""
    loss_C, *stats = run_rows("bd_kl_to_probs_f32", chunk, 2, *params)
    return RowResult(loss_C, tuple(stats))

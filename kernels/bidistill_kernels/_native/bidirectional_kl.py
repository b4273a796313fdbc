"""Forward and reverse KL and cross-entropy, per row of logits.

Both rows are swept twice, for statistics and for losses and gradient; 4 exp an id, of which the
last is e^-|r| with its distances from 1 and 1 - |r|, free of cancellation. See
kernels/csrc/rows.hpp.
"""

from collections.abc import Sequence

from bidistill_kernels._native.logits import run_rows
from bidistill_kernels._rows import Chunk, RowResult


def rows(chunk: Chunk, params: Sequence[float]) -> RowResult:
    """See `bidistill_kernels.bidirectional_kl`."""
    loss_C, *stats = run_rows("bd_bidirectional_kl_f32", chunk, 5, *params, target=True)
    return RowResult(loss_C, tuple(stats))

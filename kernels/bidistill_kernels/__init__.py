"""Fused LM-head distillation losses: public names only.

Each loss lives in a file of its own with its reference; `lm_head.py` drives them all. Derivations,
memory and precision: kernels/README.md.
"""

from bidistill_kernels._info import info
from bidistill_kernels._loss import Stats
from bidistill_kernels.bidirectional_kl import (
    LinearBidirectionalKL,
    bidirectional_kl,
    bidirectional_kl_reference,
    linear_bidirectional_kl,
)
from bidistill_kernels.cross_entropy import (
    LinearCrossEntropy,
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
)
from bidistill_kernels.jsd import LinearJSD, jsd, jsd_reference, linear_jsd
from bidistill_kernels.push_pull import (
    LinearPushPull,
    linear_push_pull,
    push_pull,
    push_pull_reference,
)
from bidistill_kernels.transform import LogitTransform

__all__ = [
    "LinearBidirectionalKL",
    "LinearCrossEntropy",
    "LinearJSD",
    "LinearPushPull",
    "LogitTransform",
    "Stats",
    "bidirectional_kl",
    "bidirectional_kl_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "info",
    "jsd",
    "jsd_reference",
    "linear_bidirectional_kl",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_push_pull",
    "push_pull",
    "push_pull_reference",
]

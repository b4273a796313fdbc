"""Fused LM-head distillation losses: public names only.

Each loss lives in a file of its own with its reference; `lm_head.py` drives them all. Derivations,
memory and precision: kernels/README.md.
"""

from bidistill_kernels._info import info
from bidistill_kernels._loss import Stats
from bidistill_kernels._rows import TopK
from bidistill_kernels.bidirectional_kl import (
    LinearBidirectionalKL,
    bidirectional_kl,
    bidirectional_kl_reference,
    linear_bidirectional_kl,
)
from bidistill_kernels.bild import LinearBiLD, bild, bild_reference, linear_bild
from bidistill_kernels.cross_entropy import (
    LinearCrossEntropy,
    cross_entropy,
    cross_entropy_reference,
    linear_cross_entropy,
)
from bidistill_kernels.jsd import LinearJSD, jsd, jsd_reference, linear_jsd
from bidistill_kernels.kl_to_probs import (
    LinearKLToProbs,
    kl_to_probs_reference,
    linear_kl_to_probs,
)
from bidistill_kernels.push_pull import (
    LinearPushPull,
    linear_push_pull,
    push_pull,
    push_pull_reference,
)
from bidistill_kernels.topk_kl import (
    LinearTopKKL,
    linear_topk_kl,
    topk_kl,
    topk_kl_reference,
    topk_log_probs,
)
from bidistill_kernels.transform import LogitTransform
from bidistill_kernels.vocab_parallel import VocabParallel

__all__ = [
    "LinearBiLD",
    "LinearBidirectionalKL",
    "LinearCrossEntropy",
    "LinearJSD",
    "LinearKLToProbs",
    "LinearPushPull",
    "LinearTopKKL",
    "LogitTransform",
    "Stats",
    "TopK",
    "VocabParallel",
    "bidirectional_kl",
    "bidirectional_kl_reference",
    "bild",
    "bild_reference",
    "cross_entropy",
    "cross_entropy_reference",
    "info",
    "jsd",
    "jsd_reference",
    "kl_to_probs_reference",
    "linear_bidirectional_kl",
    "linear_bild",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_to_probs",
    "linear_push_pull",
    "linear_topk_kl",
    "push_pull",
    "push_pull_reference",
    "topk_kl",
    "topk_kl_reference",
    "topk_log_probs",
]

"""Bidirectional logit distillation: fused LM-head losses and a thin unlearning trainer.

The losses can be imported from here. They are looked up at first use, so that the command line
starts without waiting for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bidistill.errors import UserError

if TYPE_CHECKING:
    from bidistill.about import info
    from bidistill_kernels import (
        LinearBidirectionalKL,
        LinearBiLD,
        LinearCrossEntropy,
        LinearJSD,
        LinearKLToProbs,
        LinearPushPull,
        LinearTopKKL,
        LogitTransform,
        Stats,
        TopK,
        VocabParallel,
        bidirectional_kl,
        bidirectional_kl_reference,
        bild,
        bild_reference,
        cross_entropy,
        cross_entropy_reference,
        jsd,
        jsd_reference,
        kl_to_probs_reference,
        linear_bidirectional_kl,
        linear_bild,
        linear_cross_entropy,
        linear_jsd,
        linear_kl_to_probs,
        linear_push_pull,
        linear_topk_kl,
        push_pull,
        push_pull_reference,
        topk_kl,
        topk_kl_reference,
        topk_log_probs,
    )

__version__ = "0.1.0"

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
    "UserError",
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


def __getattr__(name: str) -> object:
    """Import the home of a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'bidistill' has no attribute {name!r}")
    home = "bidistill.about" if name == "info" else "bidistill_kernels"
    return getattr(import_module(home), name)

"""Every kernel that ships, in every variant that a launch can ask for.

`bench/compile_kernels.py` compiles them without a GPU and writes their registers into
kernels/README.md; `tests/kernels/triton/test_compile.py` finds a kernel that is missing here.
"""

from bidistill_kernels._triton import (
    bidirectional_kl,
    cross_entropy,
    jsd,
    kl_to_probs,
    softmax,
    sparse,
    topk,
)
from bidistill_kernels._triton.launch import Variant

VARIANTS: list[Variant] = [
    variant
    for module in (bidirectional_kl, jsd, kl_to_probs, cross_entropy, softmax, topk, sparse)
    for variant in module.VARIANTS
]

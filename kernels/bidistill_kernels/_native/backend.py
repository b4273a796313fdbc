"""The native back-end as the driver sees it: logits of a chunk, and products of sparse gradients.

The row function of a dense loss is `rows` in the module of the loss's name. Products with the head
at K ids a token are PyTorch's: they gather rows of the head, which is all they cost.
"""

from bidistill_kernels._native.logits import NativeLogits as logits
from bidistill_kernels._torch_rows import gather_dot, sparse_dbias, sparse_dw, sparse_dx

__all__ = ["gather_dot", "logits", "sparse_dbias", "sparse_dw", "sparse_dx"]

"""The Triton back-end as the driver sees it: logits of a chunk, and products of sparse gradients.

The row function of a dense loss is `rows` in the module of the loss's name.
"""

from bidistill_kernels._triton.launch import TritonLogits as logits
from bidistill_kernels._triton.sparse import gather_dot, sparse_dbias, sparse_dw, sparse_dx

__all__ = ["gather_dot", "logits", "sparse_dbias", "sparse_dw", "sparse_dx"]

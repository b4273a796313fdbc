"""What the chunk driver works on, and where it puts the gradient of the logits.

Shapes: N tokens, M of them that count, C rows of a chunk, V vocabulary, D width of a model, K ids
of a sparse gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bidistill_kernels import _backends, _products
from bidistill_kernels._rows import ROW_LOSSES, TopK
from bidistill_kernels._vocabulary import WHOLE, Part, Vocabulary
from bidistill_kernels.transform import LogitTransform

Rows: TypeAlias = "slice | Tensor"  # a range of rows, or the listed ones


class Head(NamedTuple):
    """Hidden states and the head that turns them into logits; weight None: they are logits."""

    hidden_ND: Tensor
    weight_VD: Tensor | None
    bias_V: Tensor | None
    transform: LogitTransform

    @property
    def vocab(self) -> int:
        """Number of ids that take part."""
        V = self.hidden_ND.shape[-1] if self.weight_VD is None else self.weight_VD.shape[0]
        return min(V, self.transform.vocab_limit or V)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias of the ids that take part."""
        return None if self.bias_V is None else self.bias_V[: self.vocab].to(dtype)

    def shares_weight(self, other: "Head") -> bool:
        """Tell whether both read the same memory, which two tensors may, with alike operands."""
        a, b = self.weight_VD, other.weight_VD
        if a is None or b is None or self.hidden_ND.dtype != other.hidden_ND.dtype:
            return False
        alike = a.shape[1] == b.shape[1] and a.stride() == b.stride() and a.dtype == b.dtype
        return alike and a.data_ptr() == b.data_ptr()

    def weight(self) -> Tensor:
        """Return the head rows of the ids that take part."""
        assert self.weight_VD is not None
        return self.weight_VD[: self.vocab]

    def project(self, rows: Rows, out_CV: Tensor) -> None:
        """Write the products of the given rows with the head, without the bias."""
        hidden_CD = self.hidden_ND[rows]
        if self.weight_VD is None:
            out_CV.copy_(hidden_CD[:, : self.vocab])
        else:
            _products.project(hidden_CD, self.weight(), out_CV)


class Needs(NamedTuple):
    """Which gradients the caller needs."""

    hidden: bool
    weight: bool
    bias: bool


class Plan(NamedTuple):
    """How the driver works, as far as the caller decides it."""

    backend: str
    chunk_bytes: int
    all_rows: bool
    """No row has weight 0, and nobody needs to look: no synchronisation with the device."""
    weigh: bool
    """The sums dW and dbias are wanted, over the rows' weights; else per-row gradients, of which
    those of the logits are kept."""
    vocabulary: Vocabulary = WHOLE
    """A part of it, for the torch back-end: then rows meet other ranks', a chunk at a time."""


class LossRows(NamedTuple):
    """Per-token results of the driver; 0 at rows of weight 0, size 0 where not asked for."""

    loss_N: Tensor
    stats_SN: Tensor
    hidden_ND: Tensor
    """Gradient of each row's loss, unweighted, in the dtype of the computation."""
    weight_VD: Tensor
    """Gradient of the weighted sum of the losses, if `Plan.weigh`."""
    bias_V: Tensor
    slab_NV: Tensor
    """The kept gradient of raw logits: of a dense loss the first M rows and V columns, of a sparse
    one the values (N, K). Unweighted, without the constant factor of the transform."""
    ids_NK: Tensor


def padded(V: int) -> int:
    """Return the row stride of logits: rows start at multiples of 32 bytes in every dtype."""
    return -(-V // 16) * 16


def gradient_dtype(
    student: Head, backend: str, dtype: torch.dtype, vocabulary: Vocabulary = WHOLE
) -> torch.dtype:
    """Return the dtype of the logits' gradient: the head's, for products of 16-bit operands."""
    weight = student.weight_VD
    if weight is None or weight.dtype not in _products.HALVES:
        return dtype
    # a part of a vocabulary has no other back-end than torch to be fast with
    fast = vocabulary is not WHOLE and _products.keeps_halves(student.hidden_ND, weight)
    return weight.dtype if fast or backend == "triton" else dtype


def chunk_width(heads: int, vocab: int, vocabulary: Vocabulary) -> int:
    """Return how many logits of all heads a row has, for the size of a chunk.

    Ranks that share a vocabulary must cut rows alike: of theirs the largest part counts.
    """
    return heads * padded(vocabulary.most if isinstance(vocabulary, Part) else vocab)


def keeps_slab(
    hidden_ND: Tensor, weight_VD: Tensor | None, loss: str, needs: Needs, backend: str
) -> bool:
    """Tell whether the gradient of all logits is kept until the upstream gradient is known.

    It is while N rows of it take no more memory than one slab and the fp32 sum of dW would.
    """
    if ROW_LOSSES[loss].width is not None:
        return needs.weight or needs.bias
    slab_bytes = _backends.sizes(backend, hidden_ND.device.type).slab_bytes
    if slab_bytes == 0 or weight_VD is None or not needs.weight:
        return False  # the bias alone is a sum over rows, which needs no slab
    V, D = weight_VD.shape
    slab = hidden_ND.shape[0] * padded(V) * weight_VD.dtype.itemsize
    return slab <= slab_bytes + 4 * V * D


def slab_shape(
    student: Head, teacher: Head | TopK | None, loss: str, params: Sequence[float]
) -> tuple[int, int]:
    """Return the shape of `LossRows.slab_NV` where one is kept."""
    # not len(), which fixes a symbolic size
    N, width = student.hidden_ND.shape[0], ROW_LOSSES[loss].width
    if width is None:
        return N, padded(student.vocab)
    stored = teacher.ids.shape[1] if isinstance(teacher, TopK) else 0
    return N, width(params, student.vocab, stored)


def kept_rows(row_weight_N: Tensor, all_rows: bool) -> Tensor | None:
    """Return the rows that count, None for all; one synchronisation with the device, or none."""
    return None if all_rows else row_weight_N.nonzero().squeeze(1)

"""The `Logits` of this back-end, and how tensors become arguments of the library.

Shapes: C rows of a chunk, V vocabulary, K ids a row.
"""

from ctypes import byref

import torch
from torch import Tensor

from bidistill_kernels._native.library import Model, call
from bidistill_kernels._rows import Chunk
from bidistill_kernels.transform import LogitTransform


def stride(rows_CV: Tensor) -> int:
    """Return the row stride; that of a single row may be anything."""
    assert rows_CV.dtype == torch.float32, rows_CV.dtype
    assert rows_CV.stride(1) == 1 or rows_CV.shape[1] <= 1, rows_CV.stride()
    return rows_CV.stride(0) if len(rows_CV) > 1 else rows_CV.shape[1]


class NativeLogits:
    """`Logits` of which `raw_CV` stays raw until a kernel makes it final, in place."""

    def __init__(self, raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> None:
        """Take the raw products over."""
        self.raw_CV, self.bias_V, self.transform = raw_CV, bias_V, transform
        numbers = transform.scale, transform.softcap, transform.temperature
        self._is_final = bias_V is None and numbers == (1.0, None, 1.0)

    def model(self) -> object:
        """Return the argument of a function of the library, after which the logits are final."""
        bias_V, inner, outer = None, 1.0, 0.0
        if not self._is_final:
            bias_V, t = self.bias_V, self.transform
            inner = t.scale / t.temperature
            if t.softcap is not None:
                inner, outer = t.scale / t.softcap, t.softcap / t.temperature
        self._is_final = True
        if bias_V is not None:
            bias_V = self.bias_V = bias_V.contiguous()
        pointer = None if bias_V is None else bias_V.data_ptr()
        return byref(Model(self.raw_CV.data_ptr(), stride(self.raw_CV), pointer, inner, outer))

    def _run(self, name: str, *arguments: object) -> None:
        call(name, self.model(), *self.raw_CV.shape, *arguments, torch.get_num_threads())

    def _finish(self) -> None:
        if not self._is_final:
            self._run("bd_transform_f32")

    @property
    def slope_rate(self) -> float:
        """The slope of the soft-cap is 1 - (rate * final logit)^2."""
        cap = self.transform.softcap
        return 0.0 if cap is None else self.transform.temperature / cap

    def at(self, ids_CK: Tensor) -> Tensor:
        """See `Logits`."""
        self._finish()
        return self.raw_CV.gather(1, ids_CK)

    def top(self, k: int) -> Tensor:
        """See `Logits`."""
        C, V = self.raw_CV.shape
        ids_CK = torch.empty(C, min(k, V), dtype=torch.int64)
        self._run("bd_top_ids_f32", ids_CK.shape[1], ids_CK.data_ptr())
        return ids_CK

    def log_sum_exp(self) -> Tensor:
        """See `Logits`."""
        lse_C = self.raw_CV.new_empty(len(self.raw_CV))
        self._run("bd_log_sum_exp_f32", lse_C.data_ptr())
        return lse_C

    def mask_(self, ids_CK: Tensor) -> None:
        """See `Logits`."""
        self._finish()
        self.raw_CV.scatter_(1, ids_CK, -torch.inf)

    def softmax_gradient(self, base_C: Tensor, factor_C: Tensor, gradient_CV: Tensor) -> None:
        """See `Logits`."""
        base_C, factor_C = base_C.contiguous(), factor_C.contiguous()  # a column of a table, say
        call(
            "bd_softmax_gradient_f32",
            self.model(),
            base_C.data_ptr(),
            factor_C.data_ptr(),
            self.slope_rate,
            *self.raw_CV.shape,
            gradient_CV.data_ptr(),
            stride(gradient_CV),
            torch.get_num_threads(),
        )

    def chain(self, values_CK: Tensor, logits_CK: Tensor) -> Tensor:
        """See `Logits`."""
        if self.transform.softcap is None:
            return values_CK
        return values_CK * self.transform.slope(logits_CK)


def run_rows(
    name: str, chunk: Chunk, outputs: int, *params: float, target: bool = False
) -> tuple[Tensor, ...]:
    """Run the kernel of a dense loss; returns its outputs, (C,) each.

    `target` tells whether the function takes target ids.
    """
    sides = [side for side in (chunk.student, chunk.teacher) if side is not None]
    models, raw_CV = [], chunk.student.raw_CV
    for side in sides:
        assert isinstance(side, NativeLogits)
        models.append(side.model())
    target_C, gradient_CV = chunk.target_C, chunk.gradient_CV
    if target_C is not None:
        target_C = target_C.contiguous()
    out_OC = raw_CV.new_empty(outputs, len(raw_CV))
    call(
        name,
        *models,
        *([None if target_C is None else target_C.data_ptr()] if target else []),
        *raw_CV.shape,
        *params,
        None if gradient_CV is None else gradient_CV.data_ptr(),
        0 if gradient_CV is None else stride(gradient_CV),
        out_OC.data_ptr(),
        torch.get_num_threads(),
    )
    return out_OC.unbind()

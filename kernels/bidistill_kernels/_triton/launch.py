"""How the kernels are launched, and the `Logits` of this back-end.

Shapes: C rows of a chunk, V vocabulary, K ids a row.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import Chunk
from bidistill_kernels.transform import LogitTransform


class Block(NamedTuple):
    """How many ids a program takes at a time, and with how many warps."""

    block_v: int
    num_warps: int


# One program a row. A thread holds 8 ids of both models, or 16 of one: four 16-byte loads in
# flight, 32 KiB an SM with two programs on it, twice what hides the latency of an H100's memory
_PAIR, _ONE = Block(2048, 8), Block(4096, 8)
BLOCKS = {
    "bidirectional_kl": _PAIR,
    "jsd": _PAIR,
    "kl_to_probs": _PAIR,
    "cross_entropy": _ONE,
    "log_sum_exp": _ONE,
    "softmax_gradient": _ONE,
}
# two programs of 8 warps an SM. Without it ptxas spills 8 or 16 bytes in one build of eight,
# to fit one program more; only CUDA has the option
MAX_REGISTERS = 128
# the loops hold no dot product: there is nothing that Triton would pipeline
NUM_STAGES = 1


class Variant(NamedTuple):
    """One kernel as it ships: what a launch compiles."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # CUDA only


# by the last part of a parameter's name
_TYPES = {"ptr": "*fp32", "target_ptr": "*i64", "stride_c": "i32", "has_bias": "i32", "V": "i32"}


def variants(
    name: str, kernel: Any, gradients: Iterable[str | None] = (None, "fp32", "bf16", "fp16")
) -> list[Variant]:
    """Return a dense kernel for each dtype of its gradient, with and without soft-cap."""
    block, found = BLOCKS[name], []
    for gradient, softcap in product(gradients, (False, True)):
        constexprs = {"SOFTCAP": softcap, "BLOCK_V": block.block_v}
        if "GRADIENT" in kernel.arg_names:
            constexprs["GRADIENT"] = gradient is not None
        signature = {}
        for parameter in kernel.arg_names:
            known = [kind for end, kind in _TYPES.items() if parameter.endswith(end)]
            signature[parameter] = known[-1] if known else "fp32"
        signature |= dict.fromkeys(constexprs, "constexpr")
        if gradient is not None:
            signature["gradient_ptr"] = f"*{gradient}"
        label = " ".join(filter(None, [name, gradient, "softcap" if softcap else None]))
        sizes = block.num_warps, NUM_STAGES, MAX_REGISTERS
        found.append(Variant(label, kernel, signature, constexprs, *sizes))
    return found


def run_kernel(
    kernel: Any, grid: tuple[int, ...], like: Tensor, num_warps: int, *arguments: Any, **named: Any
) -> None:
    """Run a kernel on the device of a tensor."""
    if 0 in grid:  # an error of the driver
        return
    # a kernel goes to the current device, wherever its tensors are
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](
            *arguments,
            **named,
            num_warps=num_warps,
            num_stages=NUM_STAGES,
            enable_fp_fusion=True,  # the default ends with Triton 3.9
        )


def launch(name: str, kernel: Any, rows_CV: Tensor, **arguments: Any) -> None:
    """Run a dense kernel with one program a row."""
    block = BLOCKS[name]
    arguments |= {} if torch.version.hip else {"maxnreg": MAX_REGISTERS}
    arguments |= {"V": rows_CV.shape[1], "BLOCK_V": block.block_v}
    run_kernel(kernel, (len(rows_CV),), rows_CV, block.num_warps, **arguments)


def launch_rows(
    name: str, kernel: Any, chunk: Chunk, outputs: int, **arguments: Any
) -> tuple[Tensor, ...]:
    """Run the kernel of a dense loss; returns its outputs, (C,) each."""
    student, teacher, gradient_CV = chunk.student, chunk.teacher, chunk.gradient_CV
    assert isinstance(student, TritonLogits)
    capped = student.capped
    arguments |= student.arguments("student_")
    if teacher is not None:
        assert isinstance(teacher, TritonLogits)
        capped |= teacher.capped
        arguments |= teacher.arguments("teacher_")
    out_OC = student.raw_CV.new_empty(outputs, len(student.raw_CV))
    # written by nobody where there is no gradient
    pointer, stride = (out_OC, 0) if gradient_CV is None else (gradient_CV, gradient_CV.stride(0))
    launch(
        name,
        kernel,
        student.raw_CV,
        **arguments,
        gradient_ptr=pointer,
        gradient_stride_c=stride,
        out_ptr=out_OC,
        GRADIENT=gradient_CV is not None,
        SOFTCAP=capped,
    )
    return out_OC.unbind()


class TritonLogits:
    """`Logits` of which `raw_CV` stays raw: the kernels transform what they read."""

    def __init__(self, raw_CV: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> None:
        """Take the raw products over."""
        self.raw_CV, self.bias_V, self.transform = raw_CV, bias_V, transform
        # what is left to do to `raw_CV`; not `transform` once `mask_` has made it final
        self._left = transform

    @property
    def capped(self) -> bool:
        """Is there a soft-cap that kernels must apply?"""
        return self._left.softcap is not None

    def arguments(self, prefix: str = "") -> dict[str, Any]:
        """Return a kernel's arguments by parameter.

        s = inner * (raw + bias), capped to outer * tanh(s) unless outer is 0.
        """
        left = self._left
        inner, outer = left.scale / left.temperature, 0.0
        if left.softcap is not None:
            inner, outer = left.scale / left.softcap, left.softcap / left.temperature
        found = {
            "ptr": self.raw_CV,
            "bias_ptr": self.raw_CV if self.bias_V is None else self.bias_V,
            "stride_c": self.raw_CV.stride(0),
            "has_bias": int(self.bias_V is not None),
            "inner": inner,
            "outer": outer,
        }
        return {prefix + name: value for name, value in found.items()}

    @property
    def slope_rate(self) -> float:
        """The slope of the soft-cap is 1 - (rate * final logit)^2; `mask_` does not change it."""
        cap = self.transform.softcap
        return 0.0 if cap is None else self.transform.temperature / cap

    def at(self, ids_CK: Tensor) -> Tensor:
        """See `Logits`."""
        raw_CK = self.raw_CV.gather(1, ids_CK)
        if self.bias_V is not None:
            raw_CK += self.bias_V[ids_CK]
        return self._left.apply_(raw_CK)

    def top(self, k: int) -> Tensor:
        """See `Logits`."""
        from bidistill_kernels._triton.topk import top_ids

        return top_ids(self.raw_CV, self.bias_V, self._left, k)

    def log_sum_exp(self) -> Tensor:
        """See `Logits`."""
        from bidistill_kernels._triton.softmax import log_sum_exp

        return log_sum_exp(self)

    def mask_(self, ids_CK: Tensor) -> None:
        """See `Logits`."""
        if self.capped:
            # no raw logit becomes -inf under a tanh
            if self.bias_V is not None:
                self.raw_CV.add_(self.bias_V)
            self._left.apply_(self.raw_CV)
            self.bias_V, self._left = None, LogitTransform()
        self.raw_CV.scatter_(1, ids_CK, -torch.inf if self._left.scale > 0 else torch.inf)

    def softmax_gradient(self, base_C: Tensor, factor_C: Tensor, gradient_CV: Tensor) -> None:
        """See `Logits`."""
        from bidistill_kernels._triton.softmax import softmax_gradient

        softmax_gradient(self, base_C, factor_C, gradient_CV)

    def chain(self, values_CK: Tensor, logits_CK: Tensor) -> Tensor:
        """See `Logits`."""
        if self.transform.softcap is None:
            return values_CK
        return values_CK * self.transform.slope(logits_CK)

"""Checks of what a caller passes, and their messages. None of them reads device memory."""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from bidistill_kernels._rows import TopK
from bidistill_kernels.transform import LogitTransform

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Side(NamedTuple):
    """One model's tensors as the caller passed them; `weight` None: `hidden` is what is `given`."""

    name: str  # "student" or "teacher"
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    transform: LogitTransform
    given: str = "logits"  # or "probs"

    @property
    def rows_name(self) -> str:
        """Name of the argument that has a row per token."""
        return f"{self.name}_{self.given if self.weight is None else 'hidden'}"

    @property
    def vocab(self) -> int:
        """Number of ids that take part."""
        V = self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]
        return min(V, self.transform.vocab_limit or V)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names the caller knows."""
        named = {
            self.rows_name: self.hidden,
            f"{self.name}_weight": self.weight,
            f"{self.name}_bias": self.bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def check_number(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    open_ends: bool = False,
    whole: bool = False,
) -> None:
    """Refuse a setting that is no number or lies outside [low, high], or (low, high) if open."""
    kind = "whole number" if whole else "number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a {kind}")
    inside = low < value < high if open_ends else low <= value <= high
    # compared with infinity: a compiler that traces the number has no isinf of it
    if not inside or value >= math.inf:
        ends = (f"above {low}", f"below {high}") if open_ends else (f">= {low}", f"<= {high}")
        wanted = f"a finite {kind} {ends[0]}" + ("" if math.isinf(high) else f" and {ends[1]}")
        raise ValueError(f"{name}: got {value}, expected {wanted}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_target(target: Tensor | None) -> None:
    """Refuse a loss of labels without any."""
    if target is None:
        raise ValueError(
            "target: got None with cross-entropy, expected token ids; pass target, or "
            "cross_entropy=0"
        )


def check_weight(name: str, weight: Tensor | None) -> None:
    """Refuse a head that is missing."""
    if weight is None:
        raise TypeError(
            f"{name}_weight: got None, expected the head's weight; for logits that exist take the "
            "function without linear_"
        )


def check_num_items(num_items: float | Tensor | None, reduction: str) -> None:
    """Refuse a divisor that divides nothing, or not everything alike."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: got one with reduction={reduction!r}, expected 'mean'")
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items, 0, open_ends=True)
    elif num_items.ndim:
        raise ValueError(
            f"num_items: got shape {tuple(num_items.shape)}, expected a scalar; the number of rows "
            "of all ranks and steps"
        )


def check_tensors(
    student: Side,
    teacher: Side | None,
    target: Tensor | None,
    token_weight: Tensor | None,
    *,
    part: bool = False,
) -> None:
    """Refuse tensors of the wrong kind, shape, dtype or device, and a trainable teacher."""
    for side in [student] if teacher is None else [student, teacher]:
        check_side(side, student.hidden, part=part)
    if teacher is not None:
        _check_pair(student, teacher)
    if target is not None:
        _check_tensor("target", target)
        _check_rows("target", target, student)
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"target: got {target.dtype}, expected int64 token ids")
    if token_weight is not None:
        _check_tensor("token_weight", token_weight)
        if token_weight.is_complex():
            raise TypeError(f"token_weight: got {token_weight.dtype}, expected real numbers")
        _check_rows("token_weight", token_weight, student)
        if token_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "token_weight: requires a gradient, expected a constant; pass "
                "token_weight.detach(), or weight the result of reduction='none' yourself"
            )


def check_top_k(stored: TopK, student: Side) -> None:
    """Refuse a stored teacher of the wrong shape, dtype or device."""
    N, ids, values = student.hidden.shape[0], stored.ids, stored.values
    for name, tensor in (("teacher.ids", ids), ("teacher.values", values)):
        _check_tensor(name, tensor)
        if tensor.ndim != 2 or tensor.shape[0] != N or tensor.shape[1] == 0:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected ({N}, K), a row for each of "
                f"{student.rows_name}"
            )
        if tensor.device != student.hidden.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {student.hidden.device}; "
                "move it there"
            )
    if ids.shape != values.shape:
        raise ValueError(
            f"teacher.values: got shape {tuple(values.shape)}, expected {tuple(ids.shape)}, "
            "that of teacher.ids"
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher.ids: got {ids.dtype}, expected int64 token ids")
    if values.dtype not in _FLOATS:
        raise TypeError(f"teacher.values: got {values.dtype}, expected a float dtype")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher.values: requires a gradient, expected a constant: the teacher is not trained; "
            "pass teacher.values.detach()"
        )


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")


def _check_kind(name: str, tensor: Tensor, beside: Tensor) -> None:
    _check_tensor(name, tensor)
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name}: got a DTensor, expected a plain tensor; call the loss inside the root "
            "module's forward, where FSDP has gathered the head, or pass full_tensor(); of a "
            "tensor-parallel head pass to_local() and vocab_parallel=VocabParallel.of(weight)"
        )
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: got {tensor.dtype}, expected float16, bfloat16, float32 or float64; "
            "dequantise it first"
        )
    if isinstance(beside, Tensor) and tensor.device != beside.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {beside.device}; move it there"
        )


def check_side(side: Side, beside: Tensor, *, part: bool = False) -> None:
    """Refuse one model's tensors: their kinds, shapes, and other devices than that of `beside`.

    A rank's part of a head may be empty.
    """
    if not isinstance(side.transform, LogitTransform):
        got = type(side.transform).__name__
        raise TypeError(f"{side.name}_transform: got {got}, expected a LogitTransform")
    _check_tensor(side.rows_name, side.hidden)
    if side.weight is None and side.bias is not None:
        raise ValueError(
            f"{side.name}_bias: got one beside {side.rows_name}, expected none; add it to them"
        )
    for name, tensor in side.tensors().items():
        _check_kind(name, tensor, beside)
    hidden, weight, bias = side.hidden, side.weight, side.bias
    if hidden.ndim != 2:
        raise ValueError(
            f"{side.rows_name}: got shape {tuple(hidden.shape)}, expected two dimensions, a row "
            "per token; flatten batch and time"
        )
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != hidden.shape[1]):
        raise ValueError(
            f"{side.name}_weight: got shape {tuple(weight.shape)}, expected (vocabulary, "
            f"{hidden.shape[1]}), the width of {side.rows_name}; pass the head's weight as it is"
        )
    if side.vocab == 0 and not part:
        raise ValueError(
            f"{side.name}_weight: got an empty vocabulary, expected at least one row; "
            "gather a sharded head first"
        )
    if weight is not None and bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side.name}_bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},), "
            f"one entry for each row of {side.name}_weight"
        )


def _check_pair(student: Side, teacher: Side) -> None:
    if teacher.hidden.shape[0] != student.hidden.shape[0]:
        raise ValueError(
            f"{teacher.rows_name}: got {teacher.hidden.shape[0]} rows, expected "
            f"{student.hidden.shape[0]}, one for each of {student.rows_name}; "
            "select the same answer tokens in both views"
        )
    if teacher.vocab != student.vocab:
        raise ValueError(
            f"{list(teacher.tensors())[1 if teacher.weight is not None else 0]}: got a vocabulary "
            f"of {teacher.vocab}, expected the student's {student.vocab}; cut padding rows with "
            "LogitTransform(vocab_limit=...)"
        )
    for name, tensor in teacher.tensors().items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires a gradient, expected a constant: the teacher is not trained; "
                f"pass {name}.detach()"
            )


def _check_rows(name: str, tensor: Tensor, student: Side) -> None:
    rows = student.hidden.shape[0]
    if tensor.shape != (rows,):
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected ({rows},), one entry for each row "
            f"of {student.rows_name}"
        )
    if tensor.device != student.hidden.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {student.hidden.device}; move it there"
        )

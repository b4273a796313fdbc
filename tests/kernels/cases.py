"""The losses under test, each with its reference, and inputs that show errors.

Logits are peaked, since flat softmaxes hide errors; in `near` cases the teacher is the student
plus a little noise, as in distillation of a model against itself, where the loss is small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bidistill_kernels as bk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "triton", "native")


class Case(NamedTuple):
    """One loss with one set of options."""

    linear: Callable[..., Any]
    plain: Callable[..., Any]
    reference: Callable[..., Tensor]
    options: dict[str, Any]
    has_teacher: bool = True


def _push_pull(reading: str, **options: Any) -> Case:
    settings = {"reading": reading, "k_pull": 6, "k_push": 9, "push_weight": 0.7, **options}
    return Case(bk.linear_push_pull, bk.push_pull, bk.push_pull_reference, settings)


_KL = bk.linear_bidirectional_kl, bk.bidirectional_kl, bk.bidirectional_kl_reference
CASES = {
    "forward_kl": Case(*_KL, {"forward": 1.0, "reverse": 0.0}),
    "reverse_kl": Case(*_KL, {"forward": 0.0, "reverse": 1.0}),
    "kl_and_ce": Case(*_KL, {"forward": 0.3, "reverse": 0.5, "cross_entropy": 0.2}),
    "jsd": Case(bk.linear_jsd, bk.jsd, bk.jsd_reference, {"beta": 0.5}),
    "jsd_0.1": Case(bk.linear_jsd, bk.jsd, bk.jsd_reference, {"beta": 0.1}),
    "hinge": _push_pull("hinge", margin=0.25),
    "match": _push_pull("match", delta=2.0),
    "suppress": _push_pull("suppress"),
    "bounded": _push_pull("bounded"),
    "bild": Case(bk.linear_bild, bk.bild, bk.bild_reference, {"k": 5}),
    "cross_entropy": Case(
        bk.linear_cross_entropy, bk.cross_entropy, bk.cross_entropy_reference, {}, False
    ),
}


class Inputs(NamedTuple):
    """Tensors of one call."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target: Tensor

    def to(self, dtype: torch.dtype, *, grad: bool = True) -> "Inputs":
        """Copies in another dtype; the student's take gradients."""
        x, w, y, v = (tensor.detach().to(dtype, copy=True) for tensor in self[:4])
        return Inputs(x.requires_grad_(grad), w.requires_grad_(grad), y, v, self.target)


def make_inputs(
    N: int, V: int, *, D: int = 16, E: int = 12, near: bool = False, seed: int = 0
) -> Inputs:
    """Random inputs in float64 that float32 holds exactly; 15 % of the rows are ignored."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    # logits of standard deviation 4: the top id holds most of the probability
    x, w = randn(N, D), randn(V, D) * 4 / D**0.5
    y, v = (x + 0.02 * randn(N, D), w) if near else (randn(N, E), randn(V, E) * 4 / E**0.5)
    target = torch.randint(V, (N,), generator=g)
    target[1:][torch.rand(N - 1, generator=g) < 0.15] = -100
    return Inputs(*(tensor.double().to(DEVICE) for tensor in (x, w, y, v)), target.to(DEVICE))


def fused(case: Case, inputs: Inputs, **options: Any) -> Any:
    """Call the fused loss."""
    tensors = inputs if case.has_teacher else (*inputs[:2], inputs.target)
    return case.linear(*tensors, **case.options, **options)


def plain(case: Case, student_logits: Tensor, teacher_logits: Tensor, target: Any, **options: Any):
    """Call the loss of existing logits."""
    sides = (student_logits, teacher_logits) if case.has_teacher else (student_logits,)
    return case.plain(*sides, target, **case.options, **options)


def reference_rows(case: Case, student_logits: Tensor, teacher_logits: Tensor, target: Tensor):
    """Reference loss of each row, 0 where ignored."""
    sides = (student_logits, teacher_logits) if case.has_teacher else (student_logits,)
    rows = case.reference(*sides, target.clamp(min=0), **case.options)
    return rows.masked_fill(target == -100, 0)


def eager(case: Case, inputs: Inputs) -> Tensor:
    """Reference loss of each row from full logits."""
    student = inputs.student_hidden @ inputs.student_weight.T
    return reference_rows(case, student, inputs.teacher_hidden @ inputs.teacher_weight.T, inputs[4])


def gradients(loss: Tensor, inputs: Inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the student's hidden states and head."""
    return torch.autograd.grad(loss, inputs[:2], upstream.to(loss.dtype), retain_graph=True)

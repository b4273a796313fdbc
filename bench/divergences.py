"""Divergences that a step can be taken with: the library's, PyTorch's and other projects'.

The library's is called by the trainer as ever, the others stand in for it.
Names end in their shape: N rows that predict an answer, V vocabulary, D width.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import rows_of
from bench.peers import trl_function
from bench.providers import OURS
from bidistill.config import ObjectiveConfig
from bidistill.data.packing import Packed
from bidistill.data.records import ROLES, Role
from bidistill.data.views import Example
from bidistill.objectives import Objectives, StepLoss, StepResult
from bidistill.teacher.rows import TeacherRows

LOSS = "bidirectional_kl"
KL = ObjectiveConfig(loss=LOSS)
OBJECTIVES: dict[Role, ObjectiveConfig] = {"forget": KL, "retain": KL}

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of hidden states (N, D), head (V, D), the teacher's both and targets (N,): mean over rows."""


class Provider(NamedTuple):
    """One column of the comparison."""

    name: str
    loss: str
    """What it computes, the closest it has to the bidirectional KL."""
    build: Callable[[], Objectives]


class Exchanged(Objectives):
    """The trainer's objectives with another divergence in place of the library's."""

    def __init__(self, divergence: Divergence) -> None:
        super().__init__(OBJECTIVES)
        self.divergence = divergence

    def for_step(self, examples: Sequence[Example], student: Packed) -> StepLoss:
        step = super().for_step(examples, student)
        return ExchangedLoss(self, step.target, step.role, step.counted, step.sequence)


class ExchangedLoss(StepLoss):
    """Its loss; nothing is told by role."""

    objectives: Exchanged

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherRows | None
    ) -> StepResult:
        assert bias is None
        assert teacher is not None
        head = weight if teacher.weight is None else teacher.weight
        target = self.target.to(hidden.device)
        loss = self.objectives.divergence(hidden, weight, teacher.hidden, head.detach(), target)
        return StepResult(loss, torch.zeros(len(ROLES), device=hidden.device))


def exact(loss: str) -> Exchanged:
    """What is right: the divergence in float64, on the hidden states as they are."""

    def divergence(x: Tensor, w: Tensor, y: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return rows_of(loss, x.double() @ w.double().T, y.double() @ v.double().T, None).mean()

    return Exchanged(divergence)


def _eager(fp32: bool) -> Exchanged:
    """Whole logits of both models, and PyTorch's KL in both directions."""

    def divergence(x: Tensor, w: Tensor, y: Tensor, v: Tensor, _: Tensor) -> Tensor:
        if fp32:
            x, w, y, v = (t.float() for t in (x, w, y, v))
        with torch.autocast(x.device.type, enabled=False) if fp32 else nullcontext():
            log_s = F.linear(x, w).float().log_softmax(-1)
            log_t = F.linear(y, v).float().log_softmax(-1)
        mean = partial(F.kl_div, reduction="batchmean", log_target=True)
        return (mean(log_s, log_t) + mean(log_t, log_s)) / 2

    return Exchanged(divergence)


def _trl() -> Exchanged:
    apply = trl_function().apply
    return Exchanged(lambda x, w, y, v, _: apply(x, w, None, y, v, None, 0.0)[0].mean())


def _liger() -> Exchanged:
    module = importlib.import_module("liger_kernel.transformers")
    return Exchanged(module.LigerFusedLinearJSD(jsd_beta=0.5))


def _liger_chunked() -> Exchanged:
    """It compiles itself, which helps it."""
    torch.compiler.reset()  # else for the shapes of several cases at once
    module = importlib.import_module("liger_kernel.chunked_loss")
    soft = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    return Exchanged(module.LigerFusedLinearJSDLoss(beta=0.5, **soft))


def providers(dtype: str, device_type: str) -> list[Provider]:
    """Everybody who takes part in steps of a dtype on a device."""
    fp32 = Provider("eager, fp32 logits", LOSS, partial(_eager, True))
    # liger's fused loss is Triton's, its chunked one PyTorch's
    chunked = Provider("liger chunked, beta 0.5", "jsd", _liger_chunked)
    fused = Provider("liger, beta 0.5", "jsd", _liger)
    return [
        Provider(OURS, LOSS, partial(Objectives, OBJECTIVES)),
        Provider("eager", LOSS, partial(_eager, False)),
        *[fp32] * (dtype != "float32"),
        Provider("trl, beta 0", "forward_kl", _trl),
        fused if device_type == "cuda" else chunked,
    ]

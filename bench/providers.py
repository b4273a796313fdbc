"""Who computes a case: ourselves, the bare matrix products, PyTorch, and other projects.

A provider turns a problem into a step: one forward and backward, which returns the loss and the
gradients that the case wants. Projects are imported when their provider is built, so that one
that is missing or broken costs nobody else anything.
"""

import importlib
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bidistill_kernels as bk
from bench.cases import Case, Problem, rows_of

Result = tuple[Tensor, list[Tensor]]
Loss = Callable[[Problem], Tensor]
DIVERGENCES = ("bidirectional_kl", "jsd")


class Provider(NamedTuple):
    """One column of the comparison."""

    name: str
    loss: str
    """What it computes, the closest it has to the case's loss."""
    build: Callable[[Problem], Callable[[], Result | None]]
    checked: bool = True


def _by_autograd(loss: Loss, problem: Problem) -> Callable[[], Result]:
    def step() -> Result:
        if problem.case.mode == "no_grad":
            with torch.no_grad():
                return loss(problem), []
        value = loss(problem)
        return value, list(torch.autograd.grad(value, problem.wanted))

    return step


def ours(case: Case, backend: str, **options: Any) -> Provider:
    """The library under test."""

    def loss(p: Problem) -> Tensor:
        sides = (p.x_ND, p.w_VD, p.y_ND, p.v_VD) if case.heads == 2 else (p.x_ND, p.w_VD)
        function: Any = getattr(bk, f"linear_{case.loss}")
        reduction = "none" if case.mode == "none" else "mean"
        out = function(*sides, p.target_N, backend=backend, reduction=reduction, **options)
        return out @ p.row_weight_N if case.mode == "none" else out

    return Provider("bidistill", case.loss, partial(_by_autograd, loss))


class _Project(torch.autograd.Function):
    """Logits in fp32 from 16-bit operands; the gradient is rounded to 16 bits before it is used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w.T)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        g = upstream[0].to(x.dtype)
        return g @ w, g.T @ x if ctx.needs_input_grad[1] else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the fp32 product of 16-bit matrices."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _eager_loss(
    loss: str, fp32: bool, x: Tensor, w: Tensor, y: Tensor, v: Tensor, target: Tensor | None
) -> Tensor:
    s = _Project.apply(x, w) if fp32 else (x @ w.T).float()
    t = None
    if loss != "cross_entropy":
        t = product(y, v.T) if fp32 else (y @ v.T).float()
    return rows_of(loss, s, t, target).mean()  # pyright: ignore


def _eager(case: Case, *, fp32: bool, compiled: bool = False) -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        function: Any = partial(_eager_loss, case.loss, fp32)
        if compiled:
            # on a CPU its code generator would take a minute and show nothing
            generator = "inductor" if problem.x_ND.is_cuda else "aot_eager"
            function = torch.compile(function, dynamic=False, backend=generator)
        return _by_autograd(lambda p: function(*p[1:6]), problem)

    name = ("torch.compile" if compiled else "eager") + (", fp32 logits" if fp32 else "")
    return Provider(name, case.loss, build)


def _liger(loss: str, beta: float) -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        module = importlib.import_module("liger_kernel.transformers")
        function = module.LigerFusedLinearJSD(jsd_beta=beta)
        return _by_autograd(lambda p: function(p.x_ND, p.w_VD, p.y_ND, p.v_VD, p.target_N), problem)

    return Provider(f"liger, beta {beta:g}", loss, build)


@cache
def _trl_function() -> Any:
    """Import trl's kernel alone.

    Its one import from the trainer, a context that gathers sharded heads under ZeRO-3 and does
    nothing elsewhere, would pull in `datasets` and more: a stand-in does nothing everywhere.
    """
    importlib.import_module("trl")
    stand_in: Any = types.ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *_: nullcontext()
    sys.modules.setdefault("trl.trainer.utils", stand_in)
    return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


def _trl(loss: str, beta: float) -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        apply = _trl_function().apply
        return _by_autograd(
            lambda p: apply(p.x_ND, p.w_VD, None, p.y_ND, p.v_VD, None, beta)[0].mean(), problem
        )

    return Provider(f"trl, beta {beta:g}", loss, build)


def _orda(loss: str) -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        orda = importlib.import_module("orda_kernel")
        # Jeffreys is the sum of both KLs; skew JS of 0.5 is the Jensen-Shannon divergence
        kl = {"kl_divergence": "jeffreys", "kl_weight": 0.5}
        if loss == "jsd":
            kl = {"kl_divergence": "skew_js", "kl_beta": 0.5, "kl_weight": 1.0}
        labels = torch.zeros(problem.case.N, dtype=torch.int64, device=problem.x_ND.device)

        def run(p: Problem) -> Tensor:
            teacher = orda.SeparateTeacher(p.y_ND, p.v_VD)
            weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0}
            return orda.distillation_loss(p.x_ND, p.w_VD, labels, teacher, **weights, **kl).loss

        return _by_autograd(run, problem)

    return Provider("orda", loss, build)


def _liger_ce() -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        module = importlib.import_module("liger_kernel.transformers")
        function = module.LigerFusedLinearCrossEntropyLoss()
        return _by_autograd(lambda p: function(p.w_VD, p.x_ND, p.target_N), problem)

    return Provider("liger", "cross_entropy", build)


def _cce() -> Provider:
    def build(problem: Problem) -> Callable[[], Result]:
        module: Any = importlib.import_module("cut_cross_entropy")
        run: Any = module.linear_cross_entropy
        return _by_autograd(lambda p: run(p.x_ND, p.w_VD, p.target_N, impl="cce"), problem)

    return Provider("cut-cross-entropy", "cross_entropy", build)


def providers(case: Case, backend: str) -> list[Provider]:
    """Everybody who takes part in a case, the floor first."""
    from bench.floor import floor

    everybody = [floor(case), ours(case, backend)]
    if case.mode != "mean" or case.ignored:
        return everybody
    if case.loss == "cross_entropy":
        return [*everybody, _liger_ce(), _cce()]
    if case.loss not in DIVERGENCES:
        return everybody
    everybody += [_eager(case, fp32=False), _eager(case, fp32=True)]
    everybody += [_eager(case, fp32=True, compiled=True)] * case.compiled
    if case.loss == "jsd":
        everybody += [_liger("jsd", 0.5), _trl("jsd", 0.5)]
    else:
        ends = (("forward_kl", 0.0), ("reverse_kl", 1.0))
        everybody += [make(loss, beta) for make in (_liger, _trl) for loss, beta in ends]
    return [*everybody, _orda(case.loss)]

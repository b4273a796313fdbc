"""Other projects, each by the function it offers its users.

They are imported when their provider is built, so that one that is missing or broken costs nobody
else anything. A project that has nothing for a case says so then.
"""

import importlib
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Problem
from bench.provider import NotInstalled, NotOffered, Provider, Result, by_autograd

# F.linear_cross_entropy makes chunks so small that the head is read for every one or two rows where
# there are fewer rows than the head is wide: its documentation advises whole logits then. Of still
# fewer rows a step takes a minute.
CHUNKED_FROM = 4
KL_ENDS = (("forward_kl", 0.0), ("reverse_kl", 1.0))


def divergences(case: Case) -> list[tuple[str, float]]:
    """Return what a project with one parameter beta has for a case: (loss, beta).

    Its ends are the two KLs; it computes one of them, never their mean.
    """
    return [("jsd", 0.5)] if case.loss == "jsd" else list(KL_ENDS)


def reduction(case: Case) -> str:
    """Return PyTorch's word for what a case does with the rows."""
    return "none" if case.mode == "none" else "mean"


def reduced(out: Tensor, problem: Problem) -> Tensor:
    """Apply the upstream gradient of a loss per row; a mean has none."""
    return out @ problem.row_weight_N if problem.case.mode == "none" else out


def liger(case: Case, loss: str, beta: float) -> Provider:
    """Fused JSD of liger-kernel, a Triton kernel: no loss per row."""

    def build(problem: Problem) -> Callable[[], Result]:
        _require_mean(case)
        _require_triton(problem)
        module = importlib.import_module("liger_kernel.transformers")
        function = module.LigerFusedLinearJSD(jsd_beta=beta)
        return by_autograd(lambda p: function(p.x_ND, p.w_VD, p.y_ND, p.v_VD, p.target_N), problem)

    return Provider(f"liger, beta {beta:g}", loss, build)


def liger_chunked(case: Case, loss: str, beta: float) -> Provider:
    """Chunked JSD of liger-kernel, PyTorch's own operations: no loss per row; a frozen head's
    gradient it computes all the same, and without gradients both."""

    def build(problem: Problem) -> Callable[[], Result]:
        _require_mean(case)
        module = importlib.import_module("liger_kernel.chunked_loss")
        soft = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
        function = module.LigerFusedLinearJSDLoss(beta=beta, **soft)
        labels = _labels(problem)
        return by_autograd(lambda p: function(p.x_ND, p.w_VD, p.y_ND, p.v_VD, labels), problem)

    return Provider(f"liger chunked, beta {beta:g}", loss, build)


@cache
def trl_function() -> Any:
    """Import trl's kernel alone.

    Its one import from the trainer, a context that gathers sharded heads under ZeRO-3 and does
    nothing elsewhere, would pull in `datasets` and more: a stand-in does nothing everywhere.
    """
    importlib.import_module("trl")
    stand_in: Any = types.ModuleType("trl.trainer.utils")
    stand_in.maybe_gather_lm_head_ctx = lambda *_: nullcontext()
    sys.modules.setdefault("trl.trainer.utils", stand_in)
    return importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction


def trl(case: Case, loss: str, beta: float) -> Provider:
    """Chunked divergence of trl: a loss per row.

    Triton on a GPU, where its trainer takes ignored rows out before; PyTorch's operations on a CPU,
    where it masks them afterwards.
    """

    def build(problem: Problem) -> Callable[[], Result]:
        apply = trl_function().apply

        def loss(p: Problem) -> Tensor:
            x, y, weight = p.x_ND, p.y_ND, p.row_weight_N
            if p.case.ignored and x.is_cuda:
                counts = weight != 0
                x, y, weight = x[counts], y[counts], weight[counts]
            return apply(x, p.w_VD, None, y, p.v_VD, None, beta)[0] @ weight

        return by_autograd(loss, problem)

    return Provider(f"trl, beta {beta:g}", loss, build)


def orda(case: Case) -> Provider:
    """Distillation loss of orda-kernel: no loss per row; on a CPU it builds whole logits."""
    # Jeffreys is the sum of both KLs; skew JS of 0.5 is the Jensen-Shannon divergence
    kl = {"kl_divergence": "jeffreys", "kl_weight": 0.5}
    if case.loss == "jsd":
        kl = {"kl_divergence": "skew_js", "kl_beta": 0.5, "kl_weight": 1.0}

    def build(problem: Problem) -> Callable[[], Result]:
        _require_mean(case)
        module: Any = importlib.import_module("orda_kernel")
        weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0}
        labels = _labels(problem)

        def run(p: Problem) -> Tensor:
            teacher = module.SeparateTeacher(p.y_ND, p.v_VD)
            return module.distillation_loss(p.x_ND, p.w_VD, labels, teacher, **weights, **kl).loss

        return by_autograd(run, problem)

    return Provider("orda", case.loss, build)


def liger_cross_entropy(case: Case) -> Provider:
    """Fused linear cross-entropy of liger-kernel, Triton: its loss per row has no backward."""

    def build(problem: Problem) -> Callable[[], Result]:
        _require_mean(case)
        _require_triton(problem)
        module = importlib.import_module("liger_kernel.transformers")
        function = module.LigerFusedLinearCrossEntropyLoss()
        return by_autograd(lambda p: function(p.w_VD, p.x_ND, p.target_N), problem)

    return Provider("liger", case.loss, build)


def cut_cross_entropy(case: Case) -> Provider:
    """Apple's cut cross-entropy: everything. Triton on a GPU, else its compiled baseline."""

    def build(problem: Problem) -> Callable[[], Result]:
        module: Any = importlib.import_module("cut_cross_entropy")
        options = {"impl": "cce" if problem.x_ND.is_cuda else "torch_compile"}
        options["reduction"] = reduction(case)
        run: Any = module.linear_cross_entropy
        return by_autograd(lambda p: reduced(run(*_ce_inputs(p), **options), p), problem)

    return Provider("cut-cross-entropy", case.loss, build)


def torch_cross_entropy(case: Case, *, chunked: bool) -> Provider:
    """PyTorch's linear cross-entropy: everything; by itself from whole logits, or in chunks."""

    def build(problem: Problem) -> Callable[[], Result]:
        if not hasattr(F, "linear_cross_entropy"):
            raise NotInstalled(f"torch {torch.__version__}: F.linear_cross_entropy came with 2.13")
        run: Any = F.linear_cross_entropy  # pyright: ignore
        options: dict[str, Any] = {"reduction": reduction(case)}
        if chunked:
            options["options"] = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore
        return by_autograd(lambda p: reduced(run(*_ce_inputs(p), **options), p), problem)

    return Provider("F.linear_cross_entropy" + ", chunked" * chunked, case.loss, build)


def peers(case: Case) -> list[Provider]:
    """Everybody else who has something for a case."""
    if case.loss == "cross_entropy":
        whole, chunked = (torch_cross_entropy(case, chunked=chunked) for chunked in (False, True))
        found = [liger_cross_entropy(case), cut_cross_entropy(case), whole]
        return found + [chunked] * (case.N >= case.D / CHUNKED_FROM)
    if case.loss in ("bidirectional_kl", "jsd"):
        makes = liger, liger_chunked, trl
        return [*(make(case, *end) for make in makes for end in divergences(case)), orda(case)]
    return []


def _require_mean(case: Case) -> None:
    """A loss per row is not what every project has."""
    if case.mode == "none":
        raise NotOffered("no loss per row with a backward")


def _ce_inputs(p: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    return p.x_ND, p.w_VD, p.target_N


def _labels(problem: Problem) -> Tensor:
    """Targets, whose values do not matter, for who only looks for ignored rows there."""
    if problem.target_N is not None:
        return problem.target_N
    return torch.zeros(problem.case.N, dtype=torch.int64, device=problem.x_ND.device)


def _require_triton(problem: Problem) -> None:
    """Triton kernels run on a GPU, or in the interpreter."""
    from triton import knobs

    if not problem.x_ND.is_cuda and not knobs.runtime.interpret:
        raise NotInstalled("a Triton kernel, and no GPU to run it")

"""Cases: what is computed on which inputs, and what the right gradients are.

Logits are peaked (standard deviation 4; the entropy of a row is about 3 nats), and the teacher is
the student plus a little noise (KL about 0.02), as in distillation of a model against itself: that
is where coarse logits cost most of the gradient. In cases called "apart" the two models have
nothing in common.

Names end in their shape: N tokens, M of them that count, C rows of a chunk, V vocabulary, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import bidistill_kernels as bk

# relative error in the Frobenius norm above which a gradient is wrong and gets no time; bf16 logits
# cost 16 to 80 % of it, one rounding to bf16 0.2 %
WRONG = 0.05
NOISE = 0.05  # of the teacher's hidden states


class Case(NamedTuple):
    """One row of the plan; every provider gets the same tensors."""

    loss: str
    N: int
    D: int
    V: int
    trained: bool = True
    """The head takes a gradient too."""
    mode: str = "mean"
    """"mean", "none" (a loss per token, with a random upstream gradient) or "no_grad"."""
    ignored: float = 0.0
    """Share of the rows that do not count."""
    near: bool = True
    timed: bool = True
    compiled: bool = False
    """torch.compile takes part: it costs tens of seconds a case."""

    @property
    def name(self) -> str:
        """The case in words."""
        words = [self.loss, f"N={self.N}", "trained" if self.trained else "frozen"]
        words += {"mean": [], "none": ["reduction=none"]}.get(self.mode, [self.mode])
        words += [f"{self.ignored:.0%} ignored"] * (self.ignored > 0)
        words += ["apart"] * (not self.near)
        return " ".join(words)

    @property
    def heads(self) -> int:
        """Number of models projected."""
        return 1 if self.loss == "cross_entropy" else 2


class Problem(NamedTuple):
    """The tensors of a case."""

    case: Case
    x_ND: Tensor
    w_VD: Tensor
    y_ND: Tensor
    v_VD: Tensor
    target_N: Tensor | None
    row_weight_N: Tensor
    """What each row's loss is multiplied by before the sum; 0 where ignored."""

    @property
    def wanted(self) -> list[Tensor]:
        """Tensors whose gradients are asked for."""
        return [self.x_ND, self.w_VD] if self.case.trained else [self.x_ND]


class Truth(NamedTuple):
    """Loss and gradients of a case, computed in float64."""

    loss: float
    gradients: list[Tensor]


def make_problem(case: Case, device: torch.device) -> Problem:
    """Draw the inputs of a case, bf16."""
    N, D, V = case.N, case.D, case.V
    g = torch.Generator(device).manual_seed(N)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    def head() -> Tensor:
        return (randn(V, D) * (4 / D**0.5)).bfloat16()

    x_ND, w_VD = randn(N, D), head()
    # two heads in memory, as two models have
    y_ND, v_VD = (x_ND + NOISE * randn(N, D), w_VD.clone()) if case.near else (randn(N, D), head())
    weight_N = torch.ones(N, device=device)
    weight_N[torch.randperm(N, generator=g, device=device)[: round(case.ignored * N)]] = 0
    target_N = None
    if case.ignored or case.loss == "cross_entropy":
        target_N = torch.randint(V, (N,), generator=g, device=device)
        target_N = target_N.masked_fill(weight_N == 0, -100)
    if case.mode == "none":
        weight_N *= torch.rand(N, generator=g, device=device) + 0.5
    grads = case.mode != "no_grad"
    x_ND = x_ND.bfloat16().requires_grad_(grads)
    w_VD.requires_grad_(grads and case.trained)
    weight_N /= (weight_N != 0).sum()
    return Problem(case, x_ND, w_VD, y_ND.bfloat16(), v_VD, target_N, weight_N)


def rows_of(loss: str, s_CV: Tensor, t_CV: Tensor | None, target_C: Tensor | None) -> Tensor:
    """Loss of each row in plain PyTorch and in the dtype given, from logits that are finite."""
    log_s, log_t = s_CV.log_softmax(-1), None if t_CV is None else t_CV.log_softmax(-1)
    if loss == "cross_entropy":
        assert target_C is not None
        return -log_s.gather(-1, target_C.clamp(min=0)[:, None]).squeeze(-1)
    assert log_t is not None
    assert t_CV is not None
    if loss == "push_pull":
        return bk.push_pull_reference(s_CV, t_CV)
    if loss == "jsd":
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        parts = log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)
        return 0.5 * parts.sum(-1)
    forward, reverse = {
        "bidirectional_kl": (0.5, 0.5),
        "forward_kl": (1.0, 0.0),
        "reverse_kl": (0.0, 1.0),
    }[loss]
    factor_CV = 0.0
    if forward:
        factor_CV = factor_CV + forward * log_t.exp()
    if reverse:
        factor_CV = factor_CV - reverse * log_s.exp()
    return (factor_CV * (log_t - log_s)).sum(-1)


def truth(problem: Problem, loss: str, chunk: int = 512) -> Truth:
    """Compute loss and gradients in float64, a chunk of rows at a time."""
    case = problem.case
    grads = case.mode != "no_grad"
    w_VD, v_VD = problem.w_VD.detach().double(), problem.v_VD.double()
    dx_ND = torch.zeros_like(problem.x_ND, dtype=torch.float32)
    dw_VD = torch.zeros_like(w_VD) if grads and case.trained else None
    total = 0.0
    for at in range(0, case.N, chunk):
        rows = slice(at, at + chunk)
        x_CD = problem.x_ND[rows].detach().double()
        s_CV = (x_CD @ w_VD.T).requires_grad_(grads)
        t_CV = problem.y_ND[rows].double() @ v_VD.T if case.heads == 2 else None
        target_C = None if problem.target_N is None else problem.target_N[rows]
        weight_C = problem.row_weight_N[rows].double()
        loss_C = rows_of(loss, s_CV, t_CV, target_C)
        total += (loss_C.detach() * weight_C).sum().item()
        if grads:
            (g_CV,) = torch.autograd.grad(loss_C, s_CV, weight_C)
            dx_ND[rows] = (g_CV @ w_VD).float()
            if dw_VD is not None:
                dw_VD.addmm_(g_CV.T, x_CD)
    gradients = [dx_ND, *([] if dw_VD is None else [dw_VD.float()])]
    return Truth(total, gradients if grads else [])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Frobenius norm; NaN stays."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    difference = (
        actual.float().sub_(expected) if actual.dtype != torch.float32 else (actual - expected)
    )
    return (difference.norm(dtype=torch.float64) / expected.norm(dtype=torch.float64)).item()


class Errors(NamedTuple):
    """Relative errors of a provider; None where it has nothing to compare."""

    loss: float
    dx: float | None
    dw: float | None

    @property
    def wrong(self) -> bool:
        """Whether it gets no time; NaN is wrong."""
        return not all(e is None or e <= WRONG for e in self)


def errors(loss: Tensor, gradients: list[Tensor], true: Truth) -> Errors:
    """Compare a result with the truth."""
    assert len(gradients) == len(true.gradients), f"{len(gradients)} gradients"
    each = [relative_error(g, t) for g, t in zip(gradients, true.gradients, strict=True)]
    dx, dw = [*each, None, None][:2]
    return Errors(abs(loss.item() - true.loss) / abs(true.loss), dx, dw)

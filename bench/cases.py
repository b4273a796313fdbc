"""Cases: what is computed on which inputs, and what the right gradients are.

Logits are peaked (standard deviation 4; the entropy of a row is about 3 nats), and the teacher is
the student plus a little noise (KL about 0.02), as in distillation of a model against itself: that
is where coarse logits cost most of the gradient. In cases called "apart" the two models have
nothing in common.

Names end in their shape: N tokens, M of them that count, C rows of a chunk, S ids of a slice of the
head, V vocabulary, D width, K stored ids.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bidistill_kernels as bk

# relative error in the Frobenius norm above which a gradient is wrong and gets no time; bf16 logits
# cost 16 to 80 % of it, one rounding to bf16 0.2 %
WRONG = 0.05
# on a CPU: so many rows of a head that has fewer numbers than this
CPU_ROWS = (256, 1 << 25), (64, 1 << 29), (32, 1 << 31)
NOISE = 0.05  # of the teacher's hidden states
STORED_IDS = 64  # of a teacher that was stored, as `topk_kl` takes it
TRUTH_BYTES = 256 << 20  # of fp64 logits that exist at a time
# of a slice of the head in fp64: larger ones the C library maps anew each time, page by page, which
# takes several times as long as what is done with them
SLICE_BYTES = 8 << 20
ROW_TENSORS = 12  # as large as the logits of a chunk, that its truth takes at most


class Head(NamedTuple):
    """Width and vocabulary of a real LM head."""

    D: int
    V: int


HEADS = {
    "SmolLM2-135M": Head(576, 49152),
    "Qwen3-0.6B": Head(1024, 151936),
    "Llama-3.2-1B": Head(2048, 128256),
    "Llama-3-8B": Head(4096, 128256),
    "Gemma-3-4B": Head(2560, 262208),
    "Qwen3-32B": Head(5120, 151936),
}


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
    head: str = ""
    """Name of the model whose head has this shape."""
    dtype: str = "bfloat16"
    """Of inputs and gradients: "float32" or "bfloat16"."""

    @property
    def name(self) -> str:
        """The case in words."""
        words = [self.loss, *[self.head] * bool(self.head), f"N={self.N}"]
        words += ["trained" if self.trained else "frozen"]
        words += {"mean": [], "none": ["reduction=none"]}.get(self.mode, [self.mode])
        words += [f"{self.ignored:.0%} ignored"] * (self.ignored > 0)
        words += ["apart"] * (not self.near)
        return " ".join(words)

    @property
    def heads(self) -> int:
        """Number of models projected; none of a teacher that is stored, or of labels."""
        return 1 if self.loss in ("cross_entropy", "topk_kl") else 2

    @property
    def kept(self) -> int:
        """Number of rows that count."""
        return self.N - round(self.ignored * self.N)

    @property
    def seed(self) -> int:
        """Of the inputs."""
        return self.N

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


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
    stored: bk.TopK | None = None
    """The teacher's best ids and their log-probabilities, for a loss that takes these."""

    @property
    def wanted(self) -> list[Tensor]:
        """Tensors whose gradients are asked for."""
        return [self.x_ND, self.w_VD] if self.case.trained else [self.x_ND]


class Truth(NamedTuple):
    """Loss and gradients of a case, computed in float64."""

    loss: float
    gradients: list[Tensor]


def case_for(head: str, loss: str, device: torch.device, **options: Any) -> Case:
    """Return a case on a real head: 8192 rows in bf16 on a GPU; on a CPU rows in fp32 and so few
    that the bare products take a second or two."""
    D, V = HEADS[head]
    N, dtype = 8192, "bfloat16"
    if device.type == "cpu":
        # 256 of the smallest head, 32 of the largest
        N, dtype = next(N for N, size in CPU_ROWS if size > V * D), "float32"
    return Case(loss, **{"N": N, "D": D, "V": V, "head": head, "dtype": dtype} | options)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the fp32 product of matrices, 16-bit ones too."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def make_problem(case: Case, device: torch.device) -> Problem:
    """Draw the inputs of a case."""
    N, D, V = case.N, case.D, case.V
    g = torch.Generator(device).manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    def head() -> Tensor:
        return randn(V, D).mul_(4 / D**0.5).to(case.torch_dtype)

    x_ND, w_VD = randn(N, D), head()
    y_ND, v_VD = (x_ND + NOISE * randn(N, D), w_VD) if case.near else (randn(N, D), head())
    if case.heads == 2 and case.near:
        v_VD = w_VD.clone()  # two heads in memory, as two models have
    weight_N = torch.ones(N, device=device)
    weight_N[torch.randperm(N, generator=g, device=device)[: N - case.kept]] = 0
    target_N = None
    if case.ignored or case.loss == "cross_entropy":
        target_N = torch.randint(V, (N,), generator=g, device=device)
        target_N = target_N.masked_fill(weight_N == 0, -100)
    if case.mode == "none":
        weight_N *= torch.rand(N, generator=g, device=device) + 0.5
    grads = case.mode != "no_grad"
    x_ND, y_ND = (t.to(case.torch_dtype) for t in (x_ND, y_ND))
    stored = _store(y_ND, v_VD) if case.loss == "topk_kl" else None
    # of one storage with the teacher's where that is not projected
    w_VD = w_VD.detach().requires_grad_(grads and case.trained)
    weight_N /= (weight_N != 0).sum()
    x_ND.requires_grad_(grads)
    return Problem(case, x_ND, w_VD, y_ND, v_VD, target_N, weight_N, stored)


def _store(y_ND: Tensor, v_VD: Tensor) -> bk.TopK:
    """Keep a teacher's best ids, as its logits are computed once and written to disk."""
    best = [
        product(y_CD, v_VD.T).log_softmax(-1).topk(min(STORED_IDS, len(v_VD)))
        for y_CD in y_ND.split(chunk_rows(len(v_VD)))
    ]
    values, ids = zip(*best, strict=True)
    return bk.TopK(torch.cat(ids), torch.cat(values))


def chunk_rows(V: int) -> int:
    """Return how many rows of fp64 logits the truth looks at, at a time."""
    return max(1, TRUTH_BYTES // (8 * V))


def _slices(head_VD: Tensor) -> Iterator[slice]:
    """Cut a head into what may exist in fp64."""
    S = max(1, SLICE_BYTES // (8 * head_VD.shape[1]))
    return (slice(at, at + S) for at in range(0, len(head_VD), S))


def needed_bytes(case: Case) -> int:
    """Return the memory of inputs, gradients and truth; providers need their own beside it."""
    size, N, D, V = case.torch_dtype.itemsize, case.N, case.D, case.V
    inputs = case.heads * (N + V) * D * size + 4 * V * D  # drawn in fp32
    grown = (N + V * case.trained) * D if case.mode != "no_grad" else 0
    C = min(N, chunk_rows(V))
    # the truth's in fp32, or fp64 while it is a sum; a provider's in fp32, and once more scaled
    return inputs + grown * (4 if C == N else 12) + 8 * grown + ROW_TENSORS * 8 * C * V


def rows_of(
    loss: str,
    s_CV: Tensor,
    t_CV: Tensor | None,
    target_C: Tensor | None,
    stored: bk.TopK | None = None,
) -> Tensor:
    """Loss of each row in plain PyTorch and in the dtype given, from logits that are finite."""
    if stored is not None:
        return bk.topk_kl_reference(s_CV, stored)
    log_s, log_t = s_CV.log_softmax(-1), None if t_CV is None else t_CV.log_softmax(-1)
    if loss == "cross_entropy":
        assert target_C is not None
        return -log_s.gather(-1, target_C.clamp(min=0)[:, None]).squeeze(-1)
    assert log_t is not None
    assert t_CV is not None
    if loss == "push_pull":
        return bk.push_pull_reference(s_CV, t_CV)
    if loss == "bild":
        return bk.bild_reference(s_CV, t_CV)
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


def truth(problem: Problem, loss: str, chunk: int | None = None) -> Truth:
    """Compute loss and gradients in float64, a chunk of rows and a slice of the head at a time."""
    case = problem.case
    grads = case.mode != "no_grad"
    C = min(case.N, chunk or chunk_rows(case.V))
    w_VD, v_VD = problem.w_VD.detach(), problem.v_VD
    dx_ND = torch.zeros_like(problem.x_ND, dtype=torch.float32, requires_grad=False)
    # a gradient that is a sum over chunks is rounded when it is whole
    dtype = torch.float32 if C == case.N else torch.float64
    dw_VD = torch.zeros_like(w_VD, dtype=dtype) if grads and case.trained else None
    total = 0.0
    for at in range(0, case.N, C):
        rows = slice(at, at + C)
        x_CD = problem.x_ND[rows].detach().double()
        s_CV = _project(x_CD, w_VD).requires_grad_(grads)
        t_CV = _project(problem.y_ND[rows].double(), v_VD) if case.heads == 2 else None
        target_C = None if problem.target_N is None else problem.target_N[rows]
        stored = problem.stored and bk.TopK(*(part[rows] for part in problem.stored))
        weight_C = problem.row_weight_N[rows].double()
        loss_C = rows_of(loss, s_CV, t_CV, target_C, stored)
        total += (loss_C.detach() * weight_C).sum().item()
        if grads:
            (g_CV,) = torch.autograd.grad(loss_C, s_CV, weight_C)
            dx_CD = torch.zeros_like(x_CD)
            for ids in _slices(w_VD):
                dx_CD.addmm_(g_CV[:, ids], w_VD[ids].double())
                if dw_VD is not None:
                    dw_VD[ids] += g_CV[:, ids].T @ x_CD
            dx_ND[rows] = dx_CD
    gradients = [dx_ND, *([] if dw_VD is None else [dw_VD.float()])]
    return Truth(total, gradients if grads else [])


def _project(x_CD: Tensor, w_VD: Tensor) -> Tensor:
    return torch.cat([x_CD @ w_VD[ids].double().T for ids in _slices(w_VD)], dim=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Frobenius norm; NaN stays."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    off = size = 0.0
    for ids in _slices(expected):
        e_SD = expected[ids].double()
        size += e_SD.square().sum().item()
        off += (actual[ids].double() - e_SD).square().sum().item()
    return math.sqrt(off / size) if size else math.nan


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

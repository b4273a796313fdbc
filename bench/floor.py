"""The floor: the matrix products that a case cannot do without, and nothing else.

Both projections write fp32 logits into one reused buffer, in chunks as large as ours. The logit
gradient is the real one, rounded to bf16 (random or zero operands run at another speed), and
meets the hidden states in one product each, or per chunk where the head is frozen and the
gradient need not be kept. Shapes: M rows that count, C rows of a chunk, H heads, V, D.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import Case, Problem
from bench.providers import Provider, product

CHUNK_BYTES = 1 << 30  # our default on accelerators


class Plan(NamedTuple):
    """Which products a case needs."""

    heads: int
    dx: bool
    dw: bool

    @property
    def products(self) -> int:
        """How many products of 2 M V D operations."""
        return self.heads + self.dx + self.dw


def plan(case: Case) -> Plan:
    """Return the products of a case; push-pull's gradients are gathers."""
    dense = case.mode != "no_grad" and case.loss != "push_pull"
    return Plan(case.heads, dense, dense and case.trained)


def flops(case: Case) -> float:
    """Return the floating-point operations of the floor."""
    M = case.N - round(case.ignored * case.N)
    return 2.0 * M * case.V * case.D * plan(case).products


def _gradient(problem: Problem, rows: list[Tensor]) -> Tensor:
    """Return the forward KL's logit gradient of the rows, bf16 (M, V)."""
    parts = []
    for rows_C in rows:
        p_s = product(problem.x_ND.detach()[rows_C], problem.w_VD.detach().T).softmax(-1)
        p_t = product(problem.y_ND[rows_C], problem.v_VD.T).softmax(-1)
        parts.append((p_s - p_t).bfloat16())
    return torch.cat(parts)


def floor(case: Case) -> Provider:
    """The provider; it has no result that could be checked."""

    def build(problem: Problem) -> Callable[[], None]:
        needs = plan(case)
        kept_M = problem.row_weight_N.nonzero().squeeze(1)
        most = max(1, CHUNK_BYTES // (4 * case.heads * case.V))
        chunks = list(kept_M.tensor_split(-(-len(kept_M) // most)))
        C = max(len(rows_C) for rows_C in chunks)
        logits_CV = torch.empty(C, case.V, device=kept_M.device)
        w_VD = problem.w_VD.detach()
        # gathered before the clock starts
        sides = [(problem.x_ND.detach(), w_VD), (problem.y_ND, problem.v_VD)][: needs.heads]
        operands = [[(x_ND[rows_C], w) for x_ND, w in sides] for rows_C in chunks]
        g_MV = _gradient(problem, chunks) if needs.dx else None
        x_MD = problem.x_ND.detach()[kept_M]
        pieces = [] if g_MV is None else [g_MV] if needs.dw else g_MV.split(C)

        def step() -> None:
            for pairs in operands:
                for x_CD, w in pairs:
                    _project(x_CD, w, logits_CV[: len(x_CD)])
            for piece_CV in pieces:
                torch.mm(piece_CV, w_VD)
            if needs.dw and g_MV is not None:
                torch.mm(g_MV.T, x_MD)

        return step

    return Provider("floor: bare products", case.loss, build, checked=False)


def _project(x_CD: Tensor, w_VD: Tensor, out_CV: Tensor) -> None:
    if x_CD.is_cuda:
        torch.mm(x_CD, w_VD.T, out_dtype=torch.float32, out=out_CV)
    else:
        out_CV.copy_(product(x_CD, w_VD.T))

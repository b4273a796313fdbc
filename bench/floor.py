"""The floor: the matrix products that a case cannot do without, and nothing else.

Both projections write fp32 logits into one reused buffer, in chunks. The logit gradient is the real
one, in the dtype of the inputs (random or zero operands run at another speed). On a GPU chunks are
as large as ours, and the gradient meets the hidden states in one product each, or per chunk where
the head is frozen and the gradient need not be kept. On a CPU chunks have 512 rows, all products
are per chunk and the head's gradient is a sum. Shapes: M rows that count, C rows of a chunk, H
heads, V, D.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import STORED_IDS, Case, Problem, product
from bench.provider import Provider

CHUNK_BYTES = 1 << 30  # our default on accelerators
CPU_ROWS = 512  # as fast as any number of rows above
SPARSE = ("push_pull", "bild")  # gradients on few ids, that are gathers


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
    """Return the products of a case."""
    dense = case.mode != "no_grad" and case.loss not in SPARSE
    return Plan(case.heads, dense, dense and case.trained)


def flops(case: Case) -> float:
    """Return the floating-point operations of the floor."""
    return 2.0 * case.kept * case.V * case.D * plan(case).products


def bytes_moved(case: Case) -> int:
    """Return the bytes of inputs read once and of gradients written once."""
    inputs = case.heads * (case.kept + case.V) * case.D
    gradients = (case.N + case.V * case.trained) * case.D if case.mode != "no_grad" else 0
    stored = case.kept * STORED_IDS * 12 if case.loss == "topk_kl" else 0
    return (inputs + gradients) * case.torch_dtype.itemsize + stored


def _gradient(problem: Problem, rows: list[Tensor]) -> Tensor:
    """Return the forward KL's logit gradient of the rows, (M, V)."""
    g_MV = problem.w_VD.new_empty(sum(map(len, rows)), problem.case.V, requires_grad=False)
    for rows_C, g_CV in zip(rows, g_MV.split([len(r) for r in rows]), strict=True):
        p_s = product(problem.x_ND.detach()[rows_C], problem.w_VD.detach().T).softmax(-1)
        p_t = product(problem.y_ND[rows_C], problem.v_VD.T).softmax(-1)
        g_CV.copy_(p_s.sub_(p_t))
    return g_MV


def floor(case: Case) -> Provider:
    """The provider; it has no result that could be checked."""

    def build(problem: Problem) -> Callable[[], None]:
        needs, on_cpu = plan(case), not problem.x_ND.is_cuda
        kept_M = problem.row_weight_N.nonzero().squeeze(1)
        most = CPU_ROWS if on_cpu else max(1, CHUNK_BYTES // (4 * case.heads * case.V))
        chunks = list(kept_M.tensor_split(-(-len(kept_M) // most)))
        C = max(len(rows_C) for rows_C in chunks)
        logits_CV = torch.empty(C, case.V, device=kept_M.device)
        w_VD = problem.w_VD.detach()
        # gathered before the clock starts
        sides = [(problem.x_ND.detach(), w_VD), (problem.y_ND, problem.v_VD)][: needs.heads]
        operands = [[(x_ND[rows_C], w) for x_ND, w in sides] for rows_C in chunks]
        g_MV = _gradient(problem, chunks) if needs.dx else None
        x_MD = problem.x_ND.detach()[kept_M]
        whole = needs.dw and not on_cpu
        pieces = [] if g_MV is None else [g_MV] if whole else g_MV.split([len(r) for r in chunks])
        x_pieces = x_MD.split([len(g_CV) for g_CV in pieces]) if pieces else ()

        def step() -> None:
            for pairs in operands:
                for x_CD, w in pairs:
                    _project(x_CD, w, logits_CV[: len(x_CD)])
            dw_VD = None
            for g_CV, x_CD in zip(pieces, x_pieces, strict=True):
                torch.mm(g_CV, w_VD)
                if needs.dw and dw_VD is None:
                    dw_VD = torch.mm(g_CV.T, x_CD)
                elif dw_VD is not None:
                    torch.addmm(dw_VD, g_CV.T, x_CD, out=dw_VD)

        return step

    return Provider("floor: bare products", case.loss, build, checked=False)


def _project(x_CD: Tensor, w_VD: Tensor, out_CV: Tensor) -> None:
    if x_CD.dtype == torch.float32:
        torch.mm(x_CD, w_VD.T, out=out_CV)
    elif x_CD.is_cuda:
        torch.mm(x_CD, w_VD.T, out_dtype=torch.float32, out=out_CV)
    else:
        out_CV.copy_(product(x_CD, w_VD.T))

"""Who takes part in a case: the bare matrix products, ourselves, PyTorch, and other projects."""

from functools import partial
from typing import Any

import bidistill_kernels as bk
from bench.cases import Case, Problem
from bench.eager import eager
from bench.floor import floor
from bench.peers import peers
from bench.provider import NotInstalled, Provider, by_autograd
from bidistill_kernels._native.library import load as load_native

__all__ = ["OURS", "Provider", "ours", "providers", "suite"]

OURS = "bidistill"
BACKENDS = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}


def ours(case: Case, backend: str, *, named: bool = False, **options: Any) -> Provider:
    """The library under test; the name tells the back-end or does not."""

    def loss(p: Problem) -> Any:
        function: Any = getattr(bk, f"linear_{case.loss}")
        sides = [p.x_ND, p.w_VD]
        if case.heads == 2:
            sides += [p.y_ND, p.v_VD]
        reduction = "none" if case.mode == "none" else "mean"
        teacher = [p.stored] if case.loss == "topk_kl" else []
        out = function(
            *sides, *teacher, p.target_N, backend=backend, reduction=reduction, **options
        )
        return out @ p.row_weight_N if case.mode == "none" else out

    def build(problem: Problem) -> Any:
        native = load_native()
        if backend == "native" and native.library is None:
            raise NotInstalled(f"the native library is {native.reason}")
        return by_autograd(loss, problem)

    return Provider(f"{OURS}, {backend}" if named else OURS, case.loss, build)


def _pytorch(case: Case, compiler: str = "inductor") -> list[Provider]:
    """Return PyTorch, by itself: in whole logits, with and without its compiler."""
    make = partial(eager, case)
    if case.dtype == "float32":
        return [make(), *[make(compiled=True, compiler=compiler)] * case.compiled]
    found = [make(), make(fp32=True)]
    return found + [make(fp32=True, compiled=True, compiler=compiler)] * case.compiled


def suite(case: Case, device_type: str) -> list[Provider]:
    """Everybody who takes part in a case of the suite, the floor first."""
    own = [ours(case, backend, named=True) for backend in BACKENDS[device_type]]
    return [floor(case), *own, *_pytorch(case), *peers(case)]


def providers(case: Case, backend: str, compiler: str = "inductor") -> list[Provider]:
    """Everybody who takes part in a case of the GPU script, which has nine minutes.

    Others take part where gradients of all rows are asked for.
    """
    own = [floor(case), ours(case, backend)]
    if case.mode != "mean" or case.ignored or case.loss == "push_pull":
        return own
    return [*own, *_pytorch(case, compiler), *peers(case)]

"""Each loss as one writes it in PyTorch: whole logits of both models, then its own functions.

With 16-bit inputs there are two of it: logits as the product rounds them, and logits in fp32.
Shapes: N tokens, V vocabulary, D width, K ids.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bidistill_kernels as bk
from bench.cases import Case, Problem, product
from bench.provider import Provider, Result, by_autograd


def bidirectional_kl(s_NV: Tensor, t_NV: Tensor) -> Tensor:
    log_s, log_t = s_NV.log_softmax(-1), t_NV.log_softmax(-1)
    forward = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    reverse = F.kl_div(log_t, log_s, reduction="none", log_target=True)
    return (forward.sum(-1) + reverse.sum(-1)) / 2


def jsd(s_NV: Tensor, t_NV: Tensor) -> Tensor:
    log_s, log_t = s_NV.log_softmax(-1), t_NV.log_softmax(-1)
    log_m = torch.stack([log_s, log_t]).logsumexp(0) - math.log(2)
    parts = (F.kl_div(log_m, log, reduction="none", log_target=True) for log in (log_s, log_t))
    return sum(part.sum(-1) for part in parts) / 2  # pyright: ignore


def push_pull(s_NV: Tensor, t_NV: Tensor, k: int = 10) -> Tensor:
    # not the library's reference: that sorts the vocabulary, 60 times as slow as its best 10
    pulled_NK, liked_NK = t_NV.topk(k).indices, s_NV.topk(k).indices
    pull_NK = s_NV.gather(1, pulled_NK) - t_NV.gather(1, pulled_NK)
    push_NK = s_NV.gather(1, liked_NK) - t_NV.gather(1, liked_NK)
    shared_NK = (liked_NK[:, :, None] == pulled_NK[:, None, :]).any(-1)
    push_NK = push_NK.relu().masked_fill(shared_NK, 0)
    huber = partial(F.huber_loss, reduction="none")
    zero = torch.zeros_like(pull_NK)
    return huber(pull_NK, zero).sum(-1) + huber(push_NK, zero).sum(-1)


def bild(s_NV: Tensor, t_NV: Tensor, k: int = 8, temperature: float = 3.0) -> Tensor:
    a, b = torch.triu_indices(k, k, offset=1, device=s_NV.device)
    loss_N = s_NV.new_zeros(len(s_NV))
    for leader in (t_NV, s_NV):
        ids_NK = leader.topk(k).indices
        log_q, log_p = (
            ((z[:, a] - z[:, b]) / temperature).log_softmax(-1)
            for z in (s_NV.gather(1, ids_NK), t_NV.gather(1, ids_NK))
        )
        loss_N = loss_N + F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return loss_N


PAIRS = {"bidirectional_kl": bidirectional_kl, "jsd": jsd, "push_pull": push_pull, "bild": bild}


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


def _loss(
    loss: str,
    fp32: bool,
    x_ND: Tensor,
    w_VD: Tensor,
    y_ND: Tensor,
    v_VD: Tensor,
    target_N: Tensor | None,
    weight_N: Tensor,
    stored: bk.TopK | None,
) -> Tensor:
    """Weighted sum over rows: the mean, one without ignored rows, or an upstream gradient."""
    project: Any = _Project.apply if fp32 else lambda x, w: (x @ w.T).float()
    s_NV = project(x_ND, w_VD)
    if loss == "cross_entropy":
        assert target_N is not None
        return F.cross_entropy(s_NV, target_N, reduction="none") @ weight_N
    if loss == "topk_kl":
        assert stored is not None
        return bk.topk_kl_reference(s_NV, stored) @ weight_N
    return PAIRS[loss](s_NV, project(y_ND, v_VD)) @ weight_N


def eager(
    case: Case, *, fp32: bool = False, compiled: bool = False, compiler: str = "inductor"
) -> Provider:
    """Return the provider; ignored rows it computes and leaves out of the sum."""

    def build(problem: Problem) -> Callable[[], Result]:
        function: Any = partial(_loss, case.loss, fp32)
        if compiled:
            # of one function PyTorch compiles eight shapes and then silently no more
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False, backend=compiler)
        return by_autograd(lambda p: function(*p[1:8]), problem)

    name = ("torch.compile" if compiled else "eager") + (", fp32 logits" if fp32 else "")
    return Provider(name, case.loss, build)

"""One call of a loss whose head is shared out among ranks, and the same call of the whole head.

Functions here run on every rank (tests/trainer/ranks.py).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bidistill_kernels import LogitTransform, VocabParallel
from tests.kernels.cases import CASES, Inputs, make_inputs, reference_rows


class Call(NamedTuple):
    """One call of a loss."""

    loss: str
    V: int = 97
    N: int = 11
    cuts: tuple[int, ...] | None = None
    """None: as a DTensor is cut."""
    options: dict[str, Any] = {}  # noqa: RUF012
    transform: LogitTransform | None = None
    """Of both models."""
    bias: bool = False
    weigh: bool = False
    ignore: bool = False
    """No row counts."""
    shared: bool = False
    """The teacher has the student's head, and nearly its hidden states."""
    frozen: tuple[str, ...] = ()
    """What takes no gradient, of hidden, weight and bias."""
    dtype: torch.dtype = torch.float64

    def tensors(self) -> tuple[Inputs, Tensor, Tensor, Tensor]:
        """Inputs, biases of both heads, weights of the rows; alike on all ranks."""
        inputs = make_inputs(self.N, self.V, near=self.shared) if self.N else make_inputs(1, self.V)
        g = torch.Generator().manual_seed(1)
        biases = [torch.randn(self.V, generator=g).to(self.dtype) for _ in range(2)]
        weights = (1 + torch.rand(self.N, generator=g)).to(self.dtype)
        weights[::4] = 0
        x, w, y, v = (tensor.to(self.dtype) for tensor in inputs[:4])
        exist = (self.transform and self.transform.vocab_limit) or self.V
        target = inputs.target.cpu()
        target = torch.where((target < 0) | torch.tensor(self.ignore), -100, target % exist)
        rows = Inputs(x[: self.N].cpu(), w.cpu(), y[: self.N].cpu(), v.cpu(), target[: self.N])
        return rows, *biases, weights

    def arguments(self, *, ids: slice = slice(None), **more: Any) -> tuple[list[Any], dict]:
        """Positional and keyword arguments, with the heads' rows of some ids."""
        (x, w, y, v, target), b, c, weights = self.tensors()
        x.requires_grad_("hidden" not in self.frozen)
        w = w[ids].clone().requires_grad_("weight" not in self.frozen)
        v = w.detach() if self.shared else v[ids]
        options = CASES[self.loss].options | self.options | more
        if self.bias:
            options["student_bias"] = b[ids].clone().requires_grad_("bias" not in self.frozen)
        if self.weigh:
            options["token_weight"] = weights
        if self.transform:
            options["student_transform"] = self.transform
        if not CASES[self.loss].has_teacher:
            return [x, w, target], options
        if self.transform:
            options["teacher_transform"] = self.transform
        if self.bias:
            options["teacher_bias"] = c[ids]
        return [x, w, y, v, target], options


def outcome(call: Call, parallel: VocabParallel | None = None) -> dict[str, Tensor]:
    """Loss, statistics and gradients; with `parallel` those of this rank."""
    ids = slice(None) if parallel is None else slice(parallel.start, parallel.stop)
    more = {"return_stats": True} | ({} if parallel is None else {"vocab_parallel": parallel})
    arguments, options = call.arguments(ids=ids, **more)
    loss, stats = CASES[call.loss].linear(*arguments, **options)
    named = {"hidden": arguments[0], "weight": arguments[1]}
    if call.bias:
        named["bias"] = options["student_bias"]
    found = {"loss": loss.detach()}
    found |= {name: stat for name, stat in stats._asdict().items() if stat is not None}
    leaves = {name: leaf for name, leaf in named.items() if leaf.requires_grad}
    if leaves:
        gradients = torch.autograd.grad(loss, list(leaves.values()), upstream(loss))
        found |= dict(zip(leaves, gradients, strict=True))
    return found


def upstream(loss: Tensor) -> Tensor:
    """Some upstream gradient, alike on all ranks."""
    g = torch.Generator().manual_seed(2)
    return torch.randn(loss.shape, generator=g, dtype=torch.float64).to(loss.dtype)


def eager(call: Call) -> dict[str, Tensor]:
    """Sum of the loss and its gradients from full logits in the dtype of the call."""
    (x, w, y, v, target), *_ = call.tensors()
    v = w if call.shared else v
    x.requires_grad_()
    w.requires_grad_()
    loss = reference_rows(CASES[call.loss], x @ w.T, y @ v.detach().T, target).sum()
    pairs = zip(
        ("hidden", "weight"), torch.autograd.grad(loss, (x, w), upstream(loss)), strict=True
    )
    return {"loss": loss.detach()} | dict(pairs)


def outcomes(calls: list[Call]) -> list[dict[str, Tensor]]:
    """Those of this rank."""
    return [outcome(call, parallel_of(call)) for call in calls]


def parallel_of(call: Call) -> VocabParallel:
    if call.cuts is not None:
        return VocabParallel(None, call.cuts)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return VocabParallel.of(distribute_tensor(torch.empty(call.V, 1), mesh, [Shard(0)]))


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole result of the ranks' ones, which must agree bit for bit where they are whole."""
    whole = {}
    for name, first in parts[0].items():
        if name in ("weight", "bias"):
            whole[name] = torch.cat([part[name] for part in parts])
            continue
        whole[name] = first
        for part in parts[1:]:
            torch.testing.assert_close(part[name], first, rtol=0, atol=0, equal_nan=True)
    return whole


def again(call: Call) -> tuple[Any, Any, Any]:
    """First and second backward, the latter of twice the gradient; what a third one says."""
    parallel = parallel_of(call)
    ids = slice(parallel.start, parallel.stop)
    arguments, options = call.arguments(ids=ids, vocab_parallel=parallel)
    loss = CASES[call.loss].linear(*arguments, **options)
    leaves = arguments[:2]
    first = torch.autograd.grad(loss, leaves, upstream(loss), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, 2 * upstream(loss), retain_graph=True)
    try:
        torch.autograd.grad(loss, leaves, upstream(loss), create_graph=True)
    except RuntimeError as error:
        return first, second, str(error)
    return first, second, "nothing"


def without_gradient(call: Call) -> tuple[bool, Tensor]:
    with torch.no_grad():
        parallel = parallel_of(call)
        ids = slice(parallel.start, parallel.stop)
        arguments, options = call.arguments(ids=ids, vocab_parallel=parallel)
        loss = CASES[call.loss].linear(*arguments, **options)
    return loss.requires_grad, loss

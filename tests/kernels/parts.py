"""One call of a loss whose head is shared out among ranks, and the same call of the whole head.

Functions here run on every rank (tests/trainer/ranks.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import bidistill_kernels as bk
from bidistill_kernels import LogitTransform, VocabParallel, lm_head
from tests.kernels.cases import CASES, Inputs, make_inputs, reference_rows
from tests.kernels.test_memory import peak_bytes


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


class Model(nn.Module):
    """A student and its head, as tensor parallelism and FSDP2 have them; odd widths."""

    def __init__(self, V: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(V, 10), nn.Linear(10, 13)
        self.lm_head = nn.Linear(13, V)
        self.lm_head.forward = self._loss
        self.double()

    def forward(self, ids_N: Tensor, call: Call, **options: Any) -> Tensor:
        """The loss, in the forward of the head, whose weight is whole for FSDP2 there."""
        hidden_ND = self.middle(self.embedding(ids_N)).tanh()
        # the hooks of ColwiseParallel pass on one positional argument
        return self.lm_head(hidden_ND, call=call, options=options)

    def _loss(self, hidden_ND: Any, call: Call, options: dict[str, Any]) -> Any:
        weight, bias = self.lm_head.weight, self.lm_head.bias
        teacher, v = options.pop("teacher")
        if not isinstance(weight, DTensor):
            return self._call(call, hidden_ND, weight, bias, teacher, v, options)
        parallel = VocabParallel.of(weight)
        assert parallel.stop - parallel.start == len(weight.to_local())
        v = v[parallel.start : parallel.stop]
        local = hidden_ND.to_local(), weight.to_local(), bias.to_local()
        loss = self._call(call, *local, teacher, v, options | {"vocab_parallel": parallel})
        # the hooks of ColwiseParallel want a DTensor
        return DTensor.from_local(loss, weight.device_mesh, [Replicate()])

    @staticmethod
    def _call(call: Call, x: Any, w: Any, b: Any, y: Any, v: Any, options: dict) -> Tensor:
        target = options.pop("target")
        sides = (x, w, y, v) if CASES[call.loss].has_teacher else (x, w)
        options = CASES[call.loss].options | options | {"student_bias": b}
        return CASES[call.loss].linear(*sides, target, **options)


def step(call: Call, two: bool) -> dict[str, Tensor]:
    """Loss and whole gradients of a model on one process, or on 2 x 2: FSDP2 and tensor parallel.

    The rows are shared out unevenly: 4 and 7, of which some are ignored.
    """
    model, rows = Model(call.V), slice(None)
    inputs = call.tensors()[0]
    ids_N = torch.randint(call.V, (call.N,), generator=torch.Generator().manual_seed(3))
    counted = int((inputs.target != -100).sum())
    if two:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model.lm_head, mesh["tensor"], plan)
        for module in (model.lm_head, model):
            fully_shard(module, mesh=mesh["data"])
        rows = (slice(0, 4), slice(4, None))[mesh["data"].get_local_rank()]
    teacher = inputs.teacher_hidden[rows], inputs.teacher_weight
    options = {"teacher": teacher, "target": inputs.target[rows]}
    # FSDP2 averages gradients
    items = counted / 2 if two else counted
    loss = model(ids_N[rows], call, num_items=items, **options)
    loss.backward()
    found = {name: _whole(p.grad) for name, p in model.named_parameters()}
    total = loss.detach().clone()
    if two:
        dist.all_reduce(total)
        total /= 4
    return found | {"loss": total}


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def cuts_agree(sizes: list[int]) -> bool:
    """Whether a DTensor is cut as `VocabParallel.of` says, and a gather finds the same."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for V in sizes:
        weight = distribute_tensor(torch.arange(V)[:, None], mesh, [Shard(0)])
        parallel, local = VocabParallel.of(weight), weight.to_local()
        assert local.flatten().tolist() == list(range(V))[parallel.start : parallel.stop], V
        assert VocabParallel.of(local, mesh.get_group()).cuts == parallel.cuts, V
    return True


def refusals() -> dict[str, str]:
    """What is said of calls that are wrong on every rank."""
    x, w, y, v = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2), torch.randn(5, 2)
    target, parallel = torch.zeros(4, dtype=torch.int64), VocabParallel(None, (0, 5, 10))
    options: dict[str, Any] = {"vocab_parallel": parallel}
    mesh = init_device_mesh("cpu", (2,))
    limit = LogitTransform(vocab_limit=4)
    calls = {
        "push-pull": lambda: bk.linear_push_pull(x, w, y, v, **options),
        "BiLD": lambda: bk.linear_bild(x, w, y, v, **options),
        "top-K KL": lambda: bk.linear_topk_kl(x, w, bk.topk_log_probs(y, v, 2), **options),
        "probabilities": lambda: bk.linear_kl_to_probs(x, w, w[:4, :1].expand(4, 5), **options),
        "rows": lambda: bk.linear_jsd(x, w[:4], y, v[:4], **options),
        "teacher's rows": lambda: bk.linear_jsd(x, w, y, v[:4], **options),
        "bias": lambda: bk.linear_jsd(x, w, y, v, student_bias=w.new_zeros(10), **options),
        "limit": lambda: bk.linear_jsd(x, w, y, v, teacher_transform=limit, **options),
        "backend": lambda: bk.linear_jsd(x, w, y, v, backend="native", **options),
        "logits": lambda: bk.jsd(w, w, **options),
        "type": lambda: bk.linear_cross_entropy(x, w, target, vocab_parallel=(0, 5)),
        "cuts": lambda: VocabParallel(None, (0, 10)),
        "falling cuts": lambda: VocabParallel(None, (0, 11, 10)),
        "columns": lambda: VocabParallel.of(distribute_tensor(w, mesh, [Shard(1)])),
        "DTensor": lambda: bk.linear_jsd(x, distribute_tensor(w, mesh), y, v, **options),
    }
    return {name: _said(call) for name, call in calls.items()}


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def targets_of_nobody() -> tuple[Tensor, Tensor]:
    """Losses of targets that do not exist, and of one that does."""
    parallel = VocabParallel(None, (0, 3, 6))
    w = torch.randn(6, 2)[parallel.start : parallel.stop]
    limit = LogitTransform(vocab_limit=5)
    target, options = torch.tensor([5, 4, -1, 99]), {"vocab_parallel": parallel}
    options |= {"student_transform": limit, "reduction": "none"}
    x = torch.ones(4, 2)
    ce = {"cross_entropy": 1.0, "teacher_transform": limit}
    return (
        bk.linear_cross_entropy(x, w, target, **options),
        bk.linear_bidirectional_kl(x, w, x, w, target, **ce, **options),
    )


def halves(loss: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a 16-bit head whose logits' gradient is 16 bits, as on CUDA, and fp32."""
    call = Call(loss, dtype=torch.bfloat16, N=40)
    wide = outcome(call, parallel_of(call))
    before = lm_head.gradient_dtype
    lm_head.gradient_dtype = lambda student, *_: student.weight_VD.dtype
    try:
        return outcome(call, parallel_of(call)), wide
    finally:
        lm_head.gradient_dtype = before


def peaks(loss: str, rows: tuple[int, ...], V: int, chunk_bytes: int) -> list[int]:
    """Largest sum of live allocations of a forward and backward, for numbers of rows."""
    parallel = VocabParallel.of(torch.empty(V // dist.get_world_size(), 1))
    found = []
    for N in rows:
        call = Call(loss, V=V, N=N, dtype=torch.float32, options={"chunk_bytes": chunk_bytes})
        ids = slice(parallel.start, parallel.stop)
        arguments, options = call.arguments(ids=ids, vocab_parallel=parallel)
        forward = partial(CASES[loss].linear, *arguments, **options)
        found.append(peak_bytes(lambda forward=forward: forward().backward()))
    return found


def compiled(call: Call) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of a compiled function that calls the loss, and of the same not compiled."""
    parallel = parallel_of(call)
    ids = slice(parallel.start, parallel.stop)
    (x, w, *rest), options = call.arguments(ids=ids, vocab_parallel=parallel)

    def total(x: Tensor, w: Tensor) -> Tensor:
        return 2 * CASES[call.loss].linear(x.tanh(), w, *rest, **options).sum()

    found = torch.compile(total, backend="aot_eager")(x, w)
    return torch.autograd.grad(found, (x, w)), torch.autograd.grad(total(x, w), (x, w))

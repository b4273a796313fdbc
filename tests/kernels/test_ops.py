"""The operations as torch sees them: schema, fake and autograd agree, and compile whole."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint

import bidistill_kernels as bk
from bidistill_kernels import LogitTransform, _ops
from tests.kernels.cases import CASES, DEVICE, fused, gradients, make_inputs

KINDS = {name: CASES[name] for name in ("kl_and_ce", "hinge", "cross_entropy")}
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def op_inputs(loss, params, needs, *, teacher=True, backend="torch"):
    dtype = torch.float64 if backend == "torch" else torch.float32
    x, w, y, v, target = make_inputs(5, 30).to(dtype, grad=False)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=False)]
    bias = torch.randn(30, dtype=dtype, device=DEVICE, requires_grad=needs[2])
    sides = (y, v, None, None) if teacher else (None,) * 4
    weight = (target != -100).to(dtype)
    pack, settings = LogitTransform().pack(), (backend, 2000, False, list(needs))
    return (*leaves, bias, *sides, target, weight, loss, params, pack, pack, *settings)


@pytest.mark.parametrize("op", [_ops.lm_head_loss, _ops.lm_head_rows], ids=["loss", "rows"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["all", "dX"])
def test_opcheck(op, needs, backend):
    inputs = op_inputs("bidirectional_kl", [0.5, 0.5, 0.1], needs, backend=backend)
    torch.library.opcheck(op, inputs)


def test_opcheck_without_teacher_and_sparse(backend):
    needs = (True, True, False)
    inputs = op_inputs("cross_entropy", [], needs, teacher=False, backend=backend)
    torch.library.opcheck(_ops.lm_head_loss, inputs)
    params = [4.0, 4.0, 1.0, 0.0, 1.0]
    inputs = op_inputs("push_pull_hinge", params, (True, True, True), backend=backend)
    torch.library.opcheck(_ops.lm_head_rows, inputs)


def test_opcheck_of_the_head_gradients(backend):
    inputs = op_inputs("bidirectional_kl", [0.5, 0.5, 0.1], (True, True, True), backend=backend)
    sparse = backend != "triton"  # the others keep no dense gradient
    if sparse:
        params = [4.0, 4.0, 1.0, 0.0, 1.0]
        inputs = op_inputs("push_pull_hinge", params, (True, True, True), backend=backend)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    *_, slab, ids = _ops.lm_head_rows(*inputs)
    assert slab.numel()
    assert (ids.numel() > 0) == sparse
    x, w, bias, weight = *inputs[:3], inputs[8]
    shapes = list(w.shape), w.dtype, list(bias.shape), bias.dtype
    rows = slab, ids, x, weight, weight * 0.5
    torch.library.opcheck(_ops.lm_head_gradients, (*rows, *shapes, 30, sparse, backend, False))


def test_opcheck_of_the_best_ids(backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    x, w, *_ = make_inputs(5, 30).to(dtype, grad=False)
    arguments = x, w, None, 4, LogitTransform().pack(), backend, 2000
    torch.library.opcheck(_ops.top_log_probs, arguments)


def test_a_store_in_the_same_graph():
    x, w, y, v, _ = make_inputs(6, 40, seed=1).to(torch.float32, grad=False)

    def call(x, w, y, v):
        return bk.linear_topk_kl(x, w, bk.topk_log_probs(y, v, k=4))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, y, v), call(x, w, y, v))


@each_kind
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_backward_again(case, factor, backend):
    """Gradients that were handed out and changed are not those of a second backward."""
    inputs = make_inputs(6, 40, seed=1).to(torch.float32)
    loss = fused(case, inputs, backend=backend) * factor
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    loss.backward(retain_graph=True)
    last = torch.autograd.grad(loss, inputs[:2])
    for tensor, gradient, other in zip(inputs[:2], expected, last, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)
        torch.testing.assert_close(other, gradient, rtol=0, atol=0)
        assert not other.requires_grad


def test_a_batch_of_upstream_gradients(backend):
    inputs = make_inputs(6, 40, seed=1).to(torch.float32)
    loss = fused(CASES["kl_and_ce"], inputs, backend=backend)
    once = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    twice = torch.autograd.grad(loss, inputs[:2], torch.ones(2), is_grads_batched=True)
    for single, batch in zip(once, twice, strict=True):
        torch.testing.assert_close(batch, torch.stack([single, single]), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(case, reduction, backend):
    inputs = make_inputs(6, 40).to(torch.float32)

    def call(*tensors):
        sides = tensors if case.has_teacher else (*tensors[:2], tensors[4])
        options = {"reduction": reduction, "return_stats": True, "backend": backend}
        loss, stats = case.linear(*sides, **case.options, **options)
        return loss.sum(), stats.per_token

    torch._dynamo.reset()  # the limit of graphs counts those of other cases
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(got, wanted)
    one = torch.ones((), device=DEVICE)
    got = gradients(compiled(*inputs)[0], inputs, one)
    for a, b in zip(got, gradients(call(*inputs)[0], inputs, one), strict=True):
        torch.testing.assert_close(a, b)


MODULES = {
    bk.LinearBidirectionalKL: "kl_and_ce",
    bk.LinearJSD: "jsd",
    bk.LinearPushPull: "hinge",
    bk.LinearCrossEntropy: "cross_entropy",
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules(module):
    case = CASES[MODULES[module]]
    inputs = make_inputs(6, 40).to(torch.float32)
    loss = module(**case.options, reduction="sum")
    tensors = inputs if case.has_teacher else (*inputs[:2], inputs.target)
    assert torch.equal(loss(*tensors), fused(case, inputs, reduction="sum"))
    assert torch.equal(loss(*tensors, reduction="mean"), fused(case, inputs))
    assert "reduction='sum'" in repr(loss)
    with pytest.raises(TypeError, match="betta"):
        module(betta=0.5)(*tensors)


def test_rows_left_out_have_no_gradient():
    """Whatever the upstream gradient holds there: per-row losses of weight 0 are constants."""
    inputs: list[Any] = list(op_inputs("bidirectional_kl", [0.5, 0.5, 0.0], (True, True, True)))
    weight = [1.0, 0.0, 2.0, 1.0, 0.0]
    inputs[8] = torch.tensor(weight, dtype=torch.float64, device=DEVICE)
    rows, *_ = _ops.lm_head_rows(*inputs)
    (dx,) = torch.autograd.grad(rows, inputs[0], torch.full_like(rows, 3.0))
    assert dx.any(-1).tolist() == [True, False, True, True, False]


@each_kind
def test_dynamic_shapes(case, backend):
    """Another number of tokens is another call of the same graph."""
    torch._dynamo.reset()
    counts = torch._dynamo.testing.CompileCounter()

    def call(*tensors):
        sides = tensors if case.has_teacher else (*tensors[:2], tensors[4])
        return case.linear(*sides, **case.options, backend=backend, reduction="sum")

    compiled = torch.compile(call, fullgraph=True, backend=counts, dynamic=True)
    for N in (6, 9, 12):
        inputs = make_inputs(N, 40, seed=N).to(torch.float32)
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
    assert counts.frame_count == 1


@each_kind
def test_activation_checkpointing(case, backend):
    inputs = make_inputs(6, 40).to(torch.float32)

    def call(x, w):
        return fused(
            case, inputs._replace(student_hidden=x * 1.0, student_weight=w), backend=backend
        )

    plain = gradients(call(*inputs[:2]), inputs, torch.ones((), device=DEVICE))
    saved = torch.utils.checkpoint.checkpoint(call, *inputs[:2], use_reentrant=False)
    again = gradients(saved, inputs, torch.ones((), device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@each_kind
def test_exports(case):
    class Step(torch.nn.Module):
        def forward(self, *tensors):
            sides = tensors if case.has_teacher else (*tensors[:2], tensors[4])
            return case.linear(*sides, **case.options, backend="torch")

    inputs = make_inputs(6, 40).to(torch.float32, grad=False)
    program = torch.export.export(Step(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), Step()(*inputs))

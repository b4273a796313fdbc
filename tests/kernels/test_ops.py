"""The two operations as torch sees them: schema, fake and autograd agree, and compile whole."""

from typing import Any

import pytest
import torch

import bidistill_kernels as bk
from bidistill_kernels import LogitTransform, _ops
from tests.kernels.cases import CASES, fused, gradients, make_inputs

KINDS = {name: CASES[name] for name in ("kl_and_ce", "hinge", "cross_entropy")}
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def op_inputs(loss, params, needs, *, teacher=True):
    x, w, y, v, target = make_inputs(5, 30)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), needs, strict=False)]
    bias = torch.randn(30, dtype=x.dtype, requires_grad=needs[2])
    sides = (y, v, None) if teacher else (None, None, None)
    weight = (target != -100).to(x.dtype)
    pack = LogitTransform().pack()
    return (*leaves, bias, *sides, target, weight, loss, params, pack, pack, 2000, list(needs))


@pytest.mark.parametrize("op", [_ops.lm_head_loss, _ops.lm_head_rows], ids=["loss", "rows"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["all", "dX"])
def test_opcheck(op, needs):
    torch.library.opcheck(op, op_inputs("bidirectional_kl", [0.5, 0.5, 0.1], needs))


def test_opcheck_without_teacher_and_sparse():
    inputs = op_inputs("cross_entropy", [], (True, True, False), teacher=False)
    torch.library.opcheck(_ops.lm_head_loss, inputs)
    params = [4.0, 4.0, 1.0, 0.0, 1.0]
    torch.library.opcheck(
        _ops.lm_head_loss, op_inputs("push_pull_hinge", params, (True, True, True))
    )


@each_kind
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(case, reduction):
    inputs = make_inputs(6, 40).to(torch.float32)

    def call(*tensors):
        sides = tensors if case.has_teacher else (*tensors[:2], tensors[4])
        options = {"reduction": reduction, "return_stats": True}
        loss, stats = case.linear(*sides, **case.options, **options)
        return loss.sum(), stats.per_token

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(got, wanted)
    one = torch.ones(())
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
    inputs[7] = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    rows, _ = _ops.lm_head_rows(*inputs)
    (dx,) = torch.autograd.grad(rows, inputs[0], torch.full_like(rows, 3.0))
    assert dx.any(-1).tolist() == [True, False, True, True, False]

"""bidistill.integrations.torchtitan in torchtitan's own model, loss interface and sharding."""

import copy
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from bidistill.errors import UserError
from bidistill.world import World
from examples.tiny import make_pairs
from tests.support import Wide, assert_close

pytest.importorskip("torchtitan.components.loss", reason="torchtitan is not installed")
with warnings.catch_warnings():
    # torch's own, when what torchtitan imports of its compiler is imported for the first time
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is dep", DeprecationWarning)
    from examples import torchtitan_loss as example
from torchtitan.components.loss import cross_entropy_loss

from bidistill.integrations.torchtitan import FusedDistillation, teacher_rows
from tests.integrations import torchtitan_run

ROOT = Path(__file__).parents[2]


def differentiated(model, loss):
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def eager(kind, tied, wide):
    """The objective from full logits; torchtitan's own function where there is one."""
    model = example.tiny_titan(tied=tied)
    if wide:
        model.double()
    pairs = make_pairs()
    with Wide() if wide else nullcontext():
        if kind == "distillation":
            teacher = copy.deepcopy(model)
            return differentiated(model, example.eager_kl(model, teacher, pairs))
        tokens, labels = example.batch(pairs, "prompt_ids")
        loss = cross_entropy_loss(model(tokens), labels) / (labels != -100).sum()
        return differentiated(model, loss)


@pytest.mark.parametrize("kind", ["distillation", "cross_entropy"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_objective_from_full_logits(kind, tied):
    model = example.tiny_titan(tied=tied)
    if kind == "distillation":
        teacher = copy.deepcopy(model)
        loss_fn = example.distillation(model, teacher)
        value = example.forward_backward(model, teacher, loss_fn, make_pairs())
    else:
        tokens, labels = example.batch(make_pairs(), "prompt_ids")
        loss_fn = example.cross_entropy(model)
        value, metrics = loss_fn(model(tokens), labels, (labels != -100).sum())
        value.backward()
        assert metrics == {}
    exact, exact_gradients = eager(kind, tied, wide=True)
    own, own_gradients = eager(kind, tied, wide=False)
    assert exact.dtype == torch.float64
    assert_close("loss", value.detach(), exact, own)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, exact_gradients[name], own_gradients[name])


@pytest.mark.parametrize("kind", ["distillation", "cross_entropy", "torchtitan's own"])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_and_parts_give_what_one_process_gives(ranks, kind, tied):
    loss, expected = torchtitan_run.gradients(kind, tied, 1, World())
    for found_loss, found in ranks.run(torchtitan_run.gradients, kind, tied, 2):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 3e-6 * gradient.norm(), name


def relative(found, expected):
    """Error of all gradients as one vector."""
    pairs = [(found[name].flatten(), e.flatten()) for name, e in expected.items()]
    ours, right = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return ((ours - right).norm() / right.norm()).item()


@pytest.mark.slow
def test_bf16_is_as_near_as_torchtitans_own_loss(ranks):
    _, expected = torchtitan_run.gradients("cross_entropy", False, 1, World())
    errors = []
    for kind in ("cross_entropy", "torchtitan's own"):
        _, found = ranks.run(torchtitan_run.gradients, kind, False, 1, None, "bfloat16")[0]
        errors.append(relative(found, expected))
    ours, theirs = errors
    # nearly all of it comes from the layers below, in bf16 too
    assert 0 < ours < 1.02 * theirs, errors


def test_validation_sums_and_leaves_the_head_shared(ranks):
    model = example.tiny_titan()
    tokens, labels = example.batch(torchtitan_run.PAIRS, "prompt_ids")
    expected = cross_entropy_loss(model(tokens), labels).item()
    for total, shared in ranks.run(torchtitan_run.validate):
        assert total == pytest.approx(expected, rel=1e-6)
        assert shared


def test_other_losses_are_found_by_name():
    model = example.tiny_titan()
    teacher = example.tiny_titan(seed=1)
    loss_fn = FusedDistillation.Config(name="jsd", options={"beta": 0.25}).build(
        compile_config=None
    )
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    loss_fn.set_teacher(teacher)
    found = example.forward_backward(model, teacher, loss_fn, make_pairs())
    sides = []
    for side, key in ((model, "prompt_ids"), (teacher, "teacher_prompt_ids")):
        tokens, labels = example.batch(make_pairs(), key)
        sides.append(side.lm_head(side(tokens)[labels != -100]).softmax(-1))
    s, t = sides
    m = 0.25 * t + 0.75 * s
    jsd = 0.25 * (t * (t / m).log()).sum(-1) + 0.75 * (s * (s / m).log()).sum(-1)
    assert found.item() == pytest.approx(jsd.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "npo"}, "loss: got 'npo', which does not compare LM heads"),
        ({"options": {"beta": 1.0}}, "options: got 'beta', which is no option of bidirectional_kl"),
    ],
)
def test_refuses_configurations(config, message):
    with pytest.raises(UserError, match=message):
        FusedDistillation.Config(**config).build(compile_config=None)


def test_refuses_calls():
    model = example.tiny_titan()
    tokens, labels = example.batch(make_pairs(), "prompt_ids")
    loss_fn = example.distillation(model, copy.deepcopy(model))
    rows = teacher_rows(model, tokens, labels)
    with pytest.raises(UserError, match="teacher_hidden: got none, expected a frozen teacher"):
        loss_fn(model(tokens), labels)
    with pytest.raises(UserError, match=f"teacher_hidden: got {len(rows) - 1} rows, expected"):
        loss_fn(model(tokens), labels, teacher_hidden=rows[1:])

    class SoftCapped(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).tanh()

    loss_fn.set_lm_head(SoftCapped(256, 8))
    with pytest.raises(UserError, match="lm_head: got a SoftCapped, expected a plain linear"):
        loss_fn(model(tokens), labels, teacher_hidden=rows)


def test_says_what_to_install():
    code = "import sys; sys.modules['torchtitan'] = None; import bidistill.integrations.torchtitan"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "MissingPackage: torchtitan: got none that can be imported" in said.stderr


def test_the_two_steps_to_time_compute_the_same():
    assert example.fused_step()() == pytest.approx(example.eager_step()().item(), rel=1e-5)


@pytest.mark.slow
def test_the_example_runs():
    command = [sys.executable, "examples/torchtitan_loss.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats per token" in done.stdout

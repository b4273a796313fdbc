"""examples/fsdp2.py: on two ranks the weights of one process, in one the objective from logits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bidistill.world import World
from examples import fsdp2
from examples.tiny import eager_kl, make_pairs
from tests.integrations import fsdp2_run
from tests.support import assert_close
from tests.trainer.cut import double

ROOT = Path(__file__).parents[2]
EXACT = 1e-12
"""Of fp64: sums are taken in another order."""


def assert_equal(found, expected):
    assert found.losses == pytest.approx(expected.losses, rel=EXACT)
    for kind in ("weights", "gradients"):
        whole, cut = getattr(expected, kind), getattr(found, kind)
        assert whole.keys() == cut.keys()
        for name, tensor in whole.items():
            assert tensor.any(), name
            assert (cut[name] - tensor).norm() <= EXACT * tensor.norm(), (kind, name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_and_parts_give_what_one_process_gives(ranks, tied, accumulate):
    expected = fsdp2_run.train(tied, 1, World())
    for found in ranks.run(fsdp2_run.train, tied, accumulate):
        assert_equal(found, expected)


@pytest.mark.parametrize("way", ["attach", "a pack"])
def test_adapters_need_no_copy(ranks, way):
    expected = fsdp2_run.train_adapter("a pack", 1, World())
    for found in ranks.run(fsdp2_run.train_adapter, way, 2):
        assert_equal(found, expected)


def test_the_default_casting_of_inputs_rounds_nothing(ranks):
    as_in_the_example = ranks.run(fsdp2_run.train_in_bf16, False)[0]
    as_by_default = ranks.run(fsdp2_run.train_in_bf16, True)[0]
    assert as_in_the_example.losses == as_by_default.losses
    for name, gradient in as_in_the_example.gradients.items():
        assert torch.equal(gradient, as_by_default.gradients[name]), name


def test_a_head_read_outside_its_forward_is_refused(ranks):
    for said in ranks.run(fsdp2_run.read_the_head_outside):
        assert said.startswith("student_weight: got a DTensor, expected a plain tensor")


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_objective_from_full_logits(tied):
    pairs = make_pairs()

    def differentiated(model, loss):
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    def eager(**options):
        student, teacher = fsdp2.build(World(), tied, **options)
        return differentiated(student, eager_kl(student, teacher, pairs))

    student, teacher = fsdp2.build(World(), tied)
    student_pack, teacher_pack = fsdp2.packs(pairs)
    rows = teacher.own_rows(teacher_pack, head=True)
    loss = fsdp2.fused_kl(student_pack.target, len(student_pack.target))
    value, gradients = differentiated(student, student.distill_step(student_pack, loss, rows))
    exact, exact_gradients = eager(prepare=double)
    own, own_gradients = eager()
    assert_close("loss", value, exact, own)
    for name, gradient in gradients.items():
        assert_close(name, gradient, exact_gradients[name], own_gradients[name])


def test_the_two_steps_to_time_compute_the_same():
    assert fsdp2.fused_step()() == pytest.approx(fsdp2.eager_step()().item(), rel=1e-6)


@pytest.mark.slow
def test_the_example_prints_the_same_on_two_ranks():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = []
    for size, options in ((1, []), (2, launcher)):
        command = [sys.executable, *options, "examples/fsdp2.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pattern = rf"ranks {size}, nats per token: (\S+) before, (\S+) after\n"
        before, after = map(float, re.fullmatch(pattern, done.stdout).groups())
        assert after < before
        printed.append([before, after])
    assert printed[1] == pytest.approx(printed[0], abs=1.5e-4)  # four digits, rounded

"""A run that is cut up among ranks and in time gives what the whole one gives.

Ranks are processes that meet over gloo; the reference is one process that takes each step whole.
Plain gradient descent, so that an error in a gradient shows in the weights as it is. Sequences
are uneven, and losses, weights and read-out positions differ from role to role.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from bidistill.config import ContrastSettings, ParallelConfig, as_dict
from bidistill.errors import UserError
from bidistill.train import main
from bidistill.world import World
from tests.support import OWN_ERROR
from tests.trainer import cut
from tests.trainer.cut import Case

ROOT = Path(__file__).parents[2]
MODELS = [("lora", True), ("lora", False), ("full", True), ("full", False)]
MODELS += [("full, head frozen", False)]
EXACT = 1e-12
"""Of fp64: sums are taken in another order."""


@cache
def whole(case):
    return cut.train(case, World())


def relative(actual, expected):
    """Largest error of a tensor, by norms."""
    assert actual.keys() == expected.keys()
    return max(((actual[name] - e).norm() / e.norm()).item() for name, e in expected.items())


def relative_together(actual, expected):
    """Error of all tensors as one vector: of one alone, fp32 may round most of it away."""
    pairs = [(actual[name].flatten(), e.flatten()) for name, e in expected.items()]
    found, right = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return ((found - right).norm() / right.norm()).item()


def assert_equal(found, expected, bound=EXACT):
    assert relative(found.gradients, expected.gradients) < bound
    assert relative(found.parameters, expected.parameters) < bound
    for one, other in zip(found.log, expected.log, strict=True):
        # of what moved each rank looks at entries of its own
        assert one["moved"] == pytest.approx(other["moved"], abs=0.01)
        for key in one.keys() - {"step_ms", "tokens", "moved"}:
            assert one[key] == pytest.approx(other[key], rel=bound, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("size", "shard"), [(2, None), (2, 1), (4, None), (4, 2)])
@pytest.mark.parametrize(("training", "tied"), MODELS)
def test_equals_the_whole_run(ranks, training, tied, size, shard, accumulate):
    case = Case(training, tied, shard, accumulate)
    outcomes = ranks(size).run(cut.run, case)
    expected = whole(Case(training, tied))
    assert_equal(outcomes[0], expected)
    for other in outcomes[1:]:
        assert [e | {"step_ms": 0} for e in other.log] == [
            e | {"step_ms": 0} for e in outcomes[0].log
        ]
    # nobody holds more than its share, up to what does not divide evenly
    share = expected.largest_part / (shard or size)
    assert max(o.largest_part for o in outcomes) < 1.1 * share


@pytest.mark.parametrize(("training", "tied"), MODELS)
def test_a_step_in_four_parts_is_the_whole_step(training, tied):
    found = cut.train(Case(training, tied, accumulate=4), World())
    assert_equal(found, whole(Case(training, tied)))


@pytest.mark.parametrize(
    "case",
    [
        Case("lora", recompute=True),
        Case("full", tied=False, recompute=True),
        Case("lora", live=True, accumulate=2),
        Case("full", offload=True, accumulate=2),
        Case("lora", tied=False, offload=True, live=True),
        Case("lora", tied=False, live=True, recompute=True, accumulate=2),
    ],
    ids=str,
)
def test_recomputing_offloading_and_a_live_teacher_change_nothing(ranks, case):
    expected = whole(Case(case.training, case.tied))
    assert_equal(cut.train(case, World()), expected)
    assert_equal(ranks(2).run(cut.run, case)[0], expected)


@pytest.mark.parametrize(("size", "shard"), [(2, None), (4, 2)])
@pytest.mark.parametrize(("training", "tied"), MODELS)
def test_equals_the_whole_run_in_single_precision(ranks, training, tied, size, shard):
    case = Case(training, tied, shard, accumulate=2, double=False)
    found = ranks(size).run(cut.run, case)[0]
    expected = whole(Case(training, tied, double=False))
    assert relative(found.parameters, expected.parameters) < 1e-6
    # gradients: the error that rounding makes in one process, and as much again for other sums
    exact = whole(Case(training, tied)).gradients
    own = max(relative_together(expected.gradients, exact), OWN_ERROR[torch.float32])
    assert relative_together(found.gradients, exact) < 3 * own < 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("combine", ["pcgrad", "mgda", "ngdiff"])
@pytest.mark.parametrize(("training", "tied"), MODELS[::3])
def test_combined_gradients_equal_those_of_the_whole_run(
    ranks, training, tied, combine, accumulate
):
    case = Case(training, tied, accumulate=accumulate, combine=combine)
    expected = whole(Case(training, tied, combine=combine))
    assert_equal(ranks(2).run(cut.run, case)[0], expected, 1e-9)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("combine", ["pcgrad", "mgda"])
def test_blocks_are_run_again_for_each_role(ranks, training, combine):
    case = Case(training, accumulate=2, recompute=True, combine=combine)
    expected = whole(Case(training, combine=combine))
    assert_equal(cut.train(case, World()), expected, 1e-9)
    assert_equal(ranks(2).run(cut.run, case)[0], expected, 1e-9)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_bf16_is_as_near_as_rounding_lets_it(ranks, training):
    case = Case(training, tied=False, dtype="bfloat16", double=False)
    found = ranks(2).run(cut.run, case)[0]
    exact, own = whole(Case(training, tied=False, double=False)), whole(case)
    assert all(t.dtype == torch.float32 for t in found.gradients.values())
    error = relative_together(found.gradients, exact.gradients)
    assert 1e-4 < error < 2 * relative_together(own.gradients, exact.gradients)


@pytest.mark.parametrize(("training", "tied"), MODELS[1:4])
@pytest.mark.parametrize("shard", [None, 1])
def test_a_rank_without_rows_that_count(ranks, training, tied, shard):
    case = Case(training, tied, shard, live=True)
    outcomes = ranks(2).run(cut.with_an_idle_rank, case)
    assert_equal(outcomes[0], cut.with_an_idle_rank(case, alone=True))


@pytest.mark.parametrize(("training", "tied"), MODELS[::2])
def test_resumes_on_any_number_of_ranks(ranks, tmp_path, training, tied):
    case = Case(training, tied, double=False)
    first, *_ = ranks(2).run(cut.saved, case, tmp_path)
    again, *_ = ranks(2).run(cut.restored, case, tmp_path)
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items()), "bit for bit"
    hybrid = case._replace(shard=2)
    for other in (
        ranks(4).run(cut.restored, case, tmp_path)[0],
        ranks(4).run(cut.restored, hybrid, tmp_path)[0],
        cut.restored(case, tmp_path, alone=True),
    ):
        assert first.keys() == other.keys()
        for name, value in first.items():
            if name.startswith("after/"):
                # a sign that rounding turns is a whole step of AdamW, of 1e-4
                assert (other[name] - value).abs().max() <= 2.1e-4
            elif name != "random":
                assert torch.equal(other[name], value), name


def test_ranks_that_cannot_be_grouped_are_refused(ranks):
    with pytest.raises(AssertionError, match=r"parallel.shard: got 3 with 4 ranks, expected a num"):
        ranks(4).run(cut.run, Case("lora", shard=3))


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(config, tmp_path):
    # the directions of contrastive adapters are frozen, and stand in no checkpoint
    contrast = {"contrast": ContrastSettings(), "targets": ("down_proj",)}
    adapter = replace(config.model.adapter, dropout=0.0, **contrast)
    # singular vectors depend on the number of threads
    config = replace(config, model=replace(config.model, adapter=adapter), threads=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(config)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "bidistill.cli", "train", str(recipe), f"output={tmp_path / 'two'}"]
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1
    threads = torch.get_num_threads()
    try:
        main(config)
    finally:
        torch.set_num_threads(threads)
    logs = [
        [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "two", config.output)
    ]
    assert len(logs[0]) == len(logs[1]) == config.steps
    for one, other in zip(*logs, strict=True):
        assert one["rows"] == other["rows"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    found, expected = (
        load_file(folder / "adapter/adapter_model.safetensors")
        for folder in (tmp_path / "two", config.output)
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if "lora_A" in name:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_what_takes_several_ranks_is_refused_on_one(config):
    with pytest.raises(UserError, match=r"parallel\.shard: got 2 with 1 ranks, expected a number"):
        main(replace(config, parallel=ParallelConfig(shard=2)))
    assert not config.output.exists()


def test_a_checkpoint_that_lacks_a_file_is_refused(ranks, tmp_path):
    case = Case("full", double=False)
    ranks(2).run(cut.saved, case, tmp_path)
    first, _ = sorted((tmp_path / "step-000002").glob("*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=r"step-000002: cannot be read .it has other files than"):
        cut.restored(case, tmp_path, alone=True)


def test_what_a_killed_run_left_is_cleared_away(ranks, tmp_path):
    left = tmp_path / ".step-000001.tmp"
    left.mkdir()
    (left / "half.safetensors").write_bytes(b"half")
    ranks(2).run(cut.saved, Case("lora", double=False), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_run_may_go_on_with_other_ranks(config):
    """The folder does not hold a run to the way it was cut; to everything else it does."""
    main(replace(config, steps=4))
    shutil.rmtree(config.output / "adapter")
    parallel = ParallelConfig(shard=1, accumulate=2)
    main(replace(config, steps=4, parallel=parallel), resume=True)
    assert (config.output / "adapter").exists()

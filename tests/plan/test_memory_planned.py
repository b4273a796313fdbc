"""What is planned is what a run takes: measured by the profiler, which sees each allocation.

``python -m tests.plan.test_memory_planned`` prints the table of docs/memory.md.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.plan.measured import Case, config_of, measured, planner
from tests.trainer.ranks import Ranks

TOLERANCE = 0.05
TOLERANCE_OF_RANKS = 0.1
"""A buffer of gloo's is gone when its threads come to it: that alone is 4 %, some runs."""
ALONE = [
    Case("lora"),
    Case("lora", tied=True, cache="off"),
    Case("lora", dtype="bfloat16", cache="disk"),
    Case("lora", recompute=True, accumulate=2),
    Case("lora", loss="push_pull", combine="pcgrad"),
    Case("full"),
    Case("full", tied=True, accumulate=2),
    Case("full", dtype="bfloat16", recompute=True),
    Case("full", combine="mgda", accumulate=2),
    Case("full", cache="off", teacher="frozen"),
    Case("lora", cache="off", teacher="live"),
    Case("full", cache="off", teacher="ema"),
    Case("full", cache="memory", teacher="frozen"),
    Case("full", cache="topk", loss="topk_kl"),
    Case("full", cache="topk", loss="topk_kl", teacher="frozen"),
    Case("lora", cache="topk", loss="topk_kl", dtype="bfloat16"),
    Case("lora", cache="disk", loss="topk_kl"),
    Case("full", experts=4, dtype="bfloat16"),
    Case("full", experts=4, recompute=True),
    Case("full", recompute=True, combine="pcgrad"),
    Case("lora", recompute=True, combine="pcgrad"),
    Case("full", loss="npo"),
    Case("lora", loss="npo"),
    Case("full", loss="flat"),
    Case("lora", cache="off", loss="rmu"),
]
SHARED = [
    Case("lora", dtype="bfloat16", cache="off"),
    Case("full"),
    Case("full", accumulate=2),
    Case("full", tied=True, recompute=True),
    Case("full", combine="pcgrad", dtype="bfloat16"),
    Case("full", accumulate=2, shard=1),
    Case("full", cache="off", teacher="frozen"),
    Case("lora", cache="off", teacher="live"),
    Case("full", cache="off", teacher="ema"),
    Case("full", cache="topk", loss="topk_kl"),
]


def some(cases):
    """Every second case; the others are exhaustive tests."""
    rest = pytest.mark.exhaustive
    return [pytest.param(c, id=str(c), marks=[rest] * (i % 2)) for i, c in enumerate(cases)]


@pytest.mark.parametrize("case", some(ALONE))
def test_one_rank(case, folder):
    plan = planner(config_of(case, folder)).plan(config_of(case, folder))
    found = measured(case, folder)
    assert found > 20 << 20
    assert plan.memory.total == pytest.approx(found, rel=TOLERANCE)


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.stop()


@pytest.mark.parametrize("case", some(SHARED))
def test_two_ranks(case, folder, ranks):
    plan = planner(config_of(case, folder), 2).plan(config_of(case, folder))
    found = max(ranks.run(measured, case, folder))
    assert plan.memory.total == pytest.approx(found, rel=TOLERANCE_OF_RANKS)


def test_sharing_halves_what_is_shared(folder):
    config = config_of(Case("full"), folder)
    alone, shared = (planner(config, size).plan(config).memory.most for size in (1, 2))
    for kind in "parameters", "optimiser":
        assert shared[kind] == pytest.approx(alone[kind] / 2, rel=0.01)
    assert alone["gathered"] == 0 < shared["gathered"]


def test_each_kind_is_what_it_says(folder):
    memory = planner(config_of(Case("full"), folder)).plan(config_of(Case("full"), folder)).memory
    weights = 4 * (2 * 4000 * 128 + 3 * (128 * (128 + 64 + 64 + 128 + 3 * 256) + 256) + 128)
    assert memory.most["parameters"] == pytest.approx(weights, rel=0.001)
    assert memory.most["gradients"] == pytest.approx(weights, rel=0.001)
    assert memory.most["optimiser"] == pytest.approx(2 * weights, rel=0.001)
    assert memory.most["teacher"] > 4 * 4000 * 128  # the frozen copy of the head
    assert memory.peak["gradients"] < memory.most["gradients"]


def test_best_ids_need_no_head(folder):
    for teacher in ("base", "frozen"):
        config = config_of(Case("full", cache="topk", loss="topk_kl", teacher=teacher), folder)
        plan = planner(config).plan(config)
        k = config.teacher.topk
        assert plan.memory.most["teacher"] == plan.part.rows * (8 * k + 4 * (k + 1))


def test_the_driver_of_an_accelerator_takes_larger_chunks(folder):
    config = config_of(Case("lora"), folder)
    here, there = planner(config), planner(config)
    there.target = "cuda"
    assert there.plan(config).memory.host_bytes > 0 == here.plan(config).memory.host_bytes
    assert there.plan(config).memory.peak["teacher"] < here.plan(config).memory.peak["teacher"]


def test_what_is_offloaded_lies_on_the_host(folder):
    config = config_of(Case("full", cache="disk"), folder)
    plans = planner(config, 2)
    plans.target = "cuda"
    config = replace(config, parallel=replace(config.parallel, offload=True))
    away = plans.plan(config).memory
    near = plans.plan(replace(config, parallel=replace(config.parallel, offload=False))).memory
    moved = sum(near.most[kind] for kind in ("parameters", "gradients", "optimiser"))
    assert (away.host_bytes, near.host_bytes) == (moved, 0)
    assert away.total <= near.total - near.most["parameters"] - near.most["optimiser"]
    assert away.peak["gathered"] > 0


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    group = Ranks(2)
    print("| run | ranks | planned, MiB | measured, MiB | error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, cases in (1, ALONE), (2, SHARED):
            for case in cases:
                config = config_of(case, folder)
                planned = planner(config, size).plan(config).memory.total
                run = [measured(case, folder)] if size == 1 else group.run(measured, case, folder)
                what = ", ".join(
                    str(value)
                    if isinstance(value, str) and field == "training"
                    else f"{field} {value}"
                    for field, value in case._asdict().items()
                    if value != Case._field_defaults.get(field)
                )
                error = f"{100 * (planned / max(run) - 1):+.1f} %"
                row = what, size, f"{planned / 2**20:.2f}", f"{max(run) / 2**20:.2f}", error
                print("|", " | ".join(map(str, row)), "|", flush=True)
    group.stop()


if __name__ == "__main__":
    sys.exit(main())

"""The choice is right by measurement, and where nothing fits the advice is."""

from dataclasses import replace

import pytest

from bidistill.plan.choose import smallest
from tests.plan.measured import Case, config_of, measured, planner

MIB = 1 << 20


def test_the_chosen_parts_fit_and_larger_ones_do_not(folder):
    case = Case("lora")
    config = config_of(case, folder)
    limit = 33 * MIB
    chosen = planner(config).choose(config, limit).config.parallel
    assert 1 < chosen.accumulate < 8
    assert measured(case, folder, accumulate=chosen.accumulate) <= limit
    assert measured(case, folder, accumulate=chosen.accumulate - 1) > limit


def test_a_whole_step_if_it_fits(folder):
    config = config_of(Case("lora", accumulate=4), folder)
    chosen = planner(config).choose(config, 1 << 40)
    assert (chosen.config.parallel.accumulate, chosen.config.parallel.chunk_bytes) == (1, None)


def test_the_largest_chunk_that_fits(folder):
    """Chunks of a size that matters: what is usual is more than all logits of these steps."""
    config = config_of(Case("lora"), folder)
    plans = planner(config)
    peaks = {}
    for chunk in 1 * MIB, 4 * MIB, 16 * MIB:
        parallel = replace(config.parallel, chunk_bytes=chunk)
        peaks[chunk] = plans.plan(replace(config, parallel=parallel)).memory.total
    assert peaks[1 * MIB] < peaks[4 * MIB] < peaks[16 * MIB]
    plans._chunks = lambda _: list(reversed(peaks))  # type: ignore
    for chunk, peak in peaks.items():
        chosen = plans.choose(config, peak).config.parallel
        assert (chosen.accumulate, chosen.chunk_bytes) == (1, chunk)
    given = replace(config, parallel=replace(config.parallel, chunk_bytes=2 * MIB))
    assert planner(given)._chunks(given) == [2 * MIB]


def test_the_chunk_is_what_the_losses_take(folder):
    case = Case("full")
    config = config_of(case, folder)
    small = replace(config, parallel=replace(config.parallel, chunk_bytes=MIB))
    saved = [planner(c).plan(c).memory.most["loss buffers"] for c in (config, small)]
    assert saved[0] - saved[1] > 10 * MIB


def test_advice(folder):
    config = config_of(Case("full", accumulate=2), folder)
    plans = planner(config)
    chosen = plans.choose(config, 1)
    assert chosen.config.parallel.accumulate == 8
    changes = {change.what: change.plan for change in plans.advise(chosen, 1)}
    assert "parallel.recompute=true" in changes
    assert "model.adapter={rank: 16}" in changes
    assert "parallel.shard=null" not in changes
    assert all(plan.memory.total < chosen.memory.total for plan in changes.values())
    together = min(changes.values(), key=lambda plan: plan.memory.total).config
    assert together.parallel.recompute
    assert together.model.adapter
    # one change that is enough is not mixed with others
    enough = changes["model.adapter={rank: 16}"].memory.total
    assert all(" " not in c.what.replace(": ", ":") for c in plans.advise(chosen, enough))


@pytest.mark.parametrize("last", [1, 2, 7, 8])
def test_smallest(last):
    for answer in range(1, last + 1):
        assert smallest(1, last, lambda n, answer=answer: n >= answer) == answer

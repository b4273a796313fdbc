"""The choice is right by measurement, and where nothing fits the advice is."""

import shlex
from dataclasses import replace

import pytest
import yaml
from transformers import Phi3Config

from bidistill.config import LoraSettings, as_dict, load_config
from bidistill.errors import UserError
from bidistill.plan.choose import smallest
from tests.plan.measured import SIZES, Case, config_of, measured, planner, write_config

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


@pytest.fixture
def uneven(folder):
    """A planner of a recipe where parts take more than a whole step: gradients outweigh the rest.

    Its losses' chunks are small enough to tell.
    """
    config = config_of(Case("full"), folder)
    few = {"forget": 1, "neighbor": 1}
    config = replace(config, data=replace(config.data, per_step=few))
    plans = planner(config)
    plans._chunks = lambda _: [16 * MIB, MIB]  # type: ignore

    def peak(parts, chunk):
        parallel = replace(config.parallel, accumulate=parts, chunk_bytes=chunk)
        return plans.plan(replace(config, parallel=parallel)).memory.total

    return config, plans, peak


def test_one_part_of_small_chunks_before_nothing_fits(uneven):
    config, plans, peak = uneven
    limit = peak(1, MIB)
    assert limit < min(peak(2, MIB), peak(1, 16 * MIB))
    chosen = plans.choose(config, limit).config.parallel
    assert (chosen.accumulate, chosen.chunk_bytes) == (1, MIB)


def test_the_smallest_of_all_tried_where_nothing_fits(uneven):
    config, plans, peak = uneven
    assert plans.choose(config, 1).memory.total == peak(1, MIB)
    small = replace(config, parallel=replace(config.parallel, chunk_bytes=MIB // 4))
    assert peak(1, MIB // 4) < peak(1, MIB)
    assert plans.choose(small, 1).config == small  # the recipe as it is


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
    assert "model.adapter.rank=16" in changes
    assert "parallel.shard=null" not in changes
    assert all(plan.memory.total < chosen.memory.total for plan in changes.values())
    together = min(changes.values(), key=lambda plan: plan.memory.total).config
    assert together.parallel.recompute
    assert together.model.adapter
    # one change that is enough is not mixed with others
    enough = changes["model.adapter.rank=16"].memory.total
    assert all(" " not in c.what for c in plans.advise(chosen, enough))


@pytest.mark.parametrize("training", ["full", "lora"])
def test_advice_can_be_pasted(folder, tmp_path, training):
    config = config_of(Case(training, cache="memory", combine="pcgrad"), folder)
    config = replace(config, parallel=replace(config.parallel, shard=1))
    plans = planner(config, 2)
    chosen = plans.choose(config, 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(as_dict(chosen.config)), encoding="utf-8")
    changes = plans.advise(chosen, 1)
    assert len(changes) > 3
    for change in changes:
        assert load_config(recipe, shlex.split(change.what)) == change.plan.config


def test_advice_leaves_out_what_the_model_cannot_have(folder):
    """Phi-3 has one layer for queries, keys and values, so adapters on the usual ones fit none."""
    write_config(folder / "phi3", Phi3Config(**SIZES))
    config = config_of(Case("full"), folder)
    config = replace(config, model=replace(config.model, path=str(folder / "phi3")))
    plans = planner(config)
    with pytest.raises(UserError, match="adapter"):
        plans.plan(replace(config, model=replace(config.model, adapter=LoraSettings())))
    words = [change.what for change in plans.advise(plans.choose(config, 1), 1)]
    assert "parallel.recompute=true" in words
    assert not any("adapter" in what for what in words)


@pytest.mark.parametrize("last", [1, 2, 7, 8])
def test_smallest(last):
    for answer in range(1, last + 1):
        assert smallest(1, last, lambda n, answer=answer: n >= answer) == answer

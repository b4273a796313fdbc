"""The longest part of a run is found as by looking at all parts of all ranks."""

from dataclasses import replace
from itertools import islice

import pytest

from bidistill.data.loader import RoleLoader
from bidistill.plan import longest as module
from bidistill.plan.longest import longest
from tests.plan.measured import Case, config_of, planner


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("cache", ["memory", "off"])
def test_by_looking_at_all(folder, monkeypatch, ranks, accumulate, cache):
    monkeypatch.setattr(module, "PACKED", 4)  # few enough that some are left out
    config = replace(config_of(Case("lora", accumulate=accumulate, cache=cache), folder), steps=9)
    examples = planner(config).examples
    tokens, rows = [], []
    for rank in range(ranks):
        shares = {"rank": rank, "world_size": ranks, "parts": accumulate}
        loader = RoleLoader(examples, config.data.per_step, config.seed, **shares)
        for batch, _ in islice(loader, config.steps):
            for part in batch.parts:
                packs = [part.student(), *([part.teacher()] if cache == "off" else [])]
                tokens.append(sum(pack.input_ids.numel() for pack in packs))
                rows.append(len(part.student().rows))
    found = longest(config, examples, ranks)
    assert max(part.tokens for part in found) == max(tokens)
    assert max(part.rows for part in found) == max(rows)
    assert min(tokens) < max(tokens)


def test_one_part_if_it_has_most_of_both(folder):
    config = replace(config_of(Case("lora"), folder), steps=1)
    (part,) = longest(config, planner(config).examples, 1)
    assert part.step == 1

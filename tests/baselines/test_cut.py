"""A step that is cut up among ranks and in time is the whole step, for losses of whole answers too.

In fp64. For RMU the blocks above its layer train nothing: their gradients are none, or zero.
"""

from functools import cache

import pytest

from bidistill.world import World
from tests.baselines import cut
from tests.trainer.cut import Case
from tests.trainer.test_distributed import EXACT, relative

METHODS = ("npo", "flat", "rmu")


@cache
def whole(method, combine):
    return cut.train(Case("lora", live=True, combine=combine), method, World())


def assert_equal(found, expected):
    used = {name for name, g in expected.gradients.items() if g.any()}
    assert used
    for name in found.gradients.keys() - used:
        assert not found.gradients[name].any(), name
    gradients = [{n: o.gradients[n] for n in used} for o in (found, expected)]
    assert relative(*gradients) < EXACT
    assert relative(found.parameters, expected.parameters) < EXACT
    for one, other in zip(found.log, expected.log, strict=True):
        for key in one.keys() - {"step_ms", "tokens", "moved"}:
            assert one[key] == pytest.approx(other[key], rel=EXACT, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("combine", ["sum", "mgda"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_two_parts_is_the_whole_step(method, combine):
    case = Case("lora", live=True, accumulate=2, combine=combine)
    assert_equal(cut.train(case, method, World()), whole(method, combine))


@pytest.mark.parametrize(
    "case",
    [
        Case("lora", live=True),
        Case("lora", live=True, shard=1, accumulate=2),
        Case("lora", live=True, recompute=True, accumulate=2),
        Case("lora", live=True, combine="mgda"),
    ],
    ids=["sharded", "copies, two parts", "recomputed, two parts", "role by role"],
)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_make_the_whole_step(ranks, method, case):
    first, second = ranks(2).run(cut.run, case, method)
    assert_equal(first, whole(method, case.combine))
    assert [e | {"step_ms": 0} for e in first.log] == [e | {"step_ms": 0} for e in second.log]


def test_recomputing_changes_nothing():
    for method in METHODS:
        found = cut.train(Case("lora", live=True, recompute=True), method, World())
        assert_equal(found, whole(method, "sum"))

"""Loading data, beside `datasets` and at two million records: see `bench/loading.py`.

pytest bench/bench_loading.py --benchmark-only --benchmark-json=bench/results/DATE-SLUG.json
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from bench import loading
from bench.loading import LoadCase
from bench.meter import Budget, Meter
from bench.record import ROOT

TESTS = tuple(ROOT / f"tests/data/test_{name}.py" for name in ("loader", "packing", "store"))
CASES = (LoadCase(20_000), LoadCase(2_000_000, whole=True))
TINY = (LoadCase(96), LoadCase(96, whole=True))


def pairs(device_type: str, *, tiny: bool) -> Iterator[Any]:
    """Yield (case, provider's name), the providers of a case one after the other."""
    for case in TINY if tiny else CASES:
        for provider in loading.providers(case):
            yield pytest.param(case, provider, id=f"{case.name}-{provider}")


@pytest.fixture(scope="module")
def records(meter: Meter, budget: Budget) -> Callable[[LoadCase], dict[str, Any]]:
    """Records of a case by provider: everybody is measured when the first of them asks."""

    @cache
    def measure(case: LoadCase) -> dict[str, Any]:
        return {one["provider"]: one for one in loading.measure(case, meter, budget)}

    return measure


def bench_load(case: LoadCase, provider: str, records: Callable, replay: Callable) -> None:
    replay(records(case)[provider])

"""What grows with what: the bidirectional KL against N, V and D, the other two fixed.

Each size doubles from point to point, so that on logarithmic axes a power law is a straight line.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.cases import Case
from bench.provider import Provider
from bench.providers import suite

LOSS = "bidirectional_kl"
Sizes = dict[str, int]
# the sizes that stay, and the ends of each sweep
SWEEPS: dict[str, tuple[Sizes, dict[str, tuple[int, int]]]] = {
    "cpu": (
        {"N": 256, "V": 8192, "D": 256},
        {"N": (64, 1024), "V": (2048, 32768), "D": (64, 1024)},
    ),
    "cuda": (
        {"N": 4096, "V": 32768, "D": 2048},
        {"N": (1024, 16384), "V": (8192, 131072), "D": (512, 8192)},
    ),
}
POINTS = 5


def cases(device: str) -> list[Case]:
    """Return the points of all sweeps, each once."""
    shared, sweeps = SWEEPS[device]
    dtype = "float32" if device == "cpu" else "bfloat16"
    base = Case(LOSS, shared["N"], shared["D"], shared["V"], dtype=dtype)
    found = []
    for size, (first, last) in sweeps.items():
        assert first << (POINTS - 1) == last
        found += [base._replace(**{size: first << point}) for point in range(POINTS)]
    return list(dict.fromkeys(found))


def everybody(case: Case, device: str) -> list[Provider]:
    """Return the floor, our best back-end and PyTorch, the way whose gradients are right."""
    eager = "eager" if case.dtype == "float32" else "eager, fp32 logits"
    floor, ours, *others = suite(case, device)
    return [floor, ours, *[p for p in others if p.name == eager]]


def pairs(device_type: str, *, tiny: bool) -> Iterator[Any]:
    """Yield (point, provider's name), the providers of a point one after the other."""
    points = cases(device_type)
    if tiny:
        points = [Case(LOSS, 8, 32, 1000, dtype="float32")]
    for case in points:
        for provider in everybody(case, device_type):
            yield pytest.param(case, provider.name, id=f"{name(case)}-{provider.name}")


def name(case: Case) -> str:
    """Return the point in words: each of its sizes is one of a sweep."""
    return f"{case.loss} N={case.N} V={case.V} D={case.D}"


@pytest.mark.quick
def bench_scaling(case: Case, provider: str, measure: Callable, replay: Callable) -> None:
    found = measure(case, provider, everybody)
    replay(found | {"kind": "scaling", "case": name(case)})

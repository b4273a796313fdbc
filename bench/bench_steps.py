"""Whole unlearning steps, LoRA and full fine-tuning: tokens per second and peak memory.

    pytest bench/bench_steps.py --benchmark-only --benchmark-json=bench/results/DATE-SLUG.json

`-m quick` takes a LoRA step of a smaller batch.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from bench import steps
from bench.divergences import LOSS, providers
from bench.measure import DeviceLost
from bench.meter import Budget, Meter
from bench.steps import StepCase

LOSSES = (LOSS,)
QUICK = {"cpu": StepCase("lora", 2, 64), "cuda": StepCase("lora", 8, 256, "bfloat16")}
WHOLE = {"cpu": StepCase("lora", 2, 192), "cuda": StepCase("lora", 8, 1024, "bfloat16")}
TINY = StepCase("lora", 2, 24, model="tiny")


def cases(device_type: str, *, tiny: bool) -> list[StepCase]:
    """Return the batches that suit a device, the quick one first."""
    whole = TINY if tiny else WHOLE[device_type]
    return [*[QUICK[device_type]] * (not tiny), whole, whole._replace(config="full")]


def pairs(device_type: str, *, tiny: bool) -> Iterator[Any]:
    """Yield (case, provider's name), the providers of a case one after the other."""
    for case in cases(device_type, tiny=tiny):
        marks = [pytest.mark.quick] * (case == QUICK[device_type])
        for provider in providers(case.dtype, device_type):
            name = f"{case.name}-{provider.name}"
            yield pytest.param(case, provider.name, marks=marks, id=name)


@pytest.fixture(scope="module")
def records(meter: Meter, budget: Budget) -> Callable[[StepCase], dict[str, Any]]:
    """Records of a case by provider: everybody is measured when the first of them asks."""

    @cache
    def measure(case: StepCase) -> dict[str, Any]:
        try:
            return {one["provider"]: one for one in steps.measure(case, meter, budget)}
        except DeviceLost as error:
            pytest.exit(f"the device is lost after {error.args}", returncode=3)

    return measure


def bench_step(case: StepCase, provider: str, records: Callable, replay: Callable) -> None:
    replay(records(case)[provider])

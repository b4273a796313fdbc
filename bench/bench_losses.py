"""Every loss, on real heads, in every mode, by everybody.

    pytest bench/bench_losses.py --benchmark-only --benchmark-json=bench/results/DATE-SLUG.json

All modes on the smallest head; on the others the dense losses, trained and frozen. A CPU, which
takes an hour for these, freezes the head of one loss alone. `-m quick` takes minutes on two cores.
`-m targets` is what the native back-end's bounds are about: more rows, and memory alone at 8192.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.cases import HEADS, Case, case_for
from bench.provider import Provider
from bench.providers import suite

DENSE = ("bidirectional_kl", "jsd", "cross_entropy")
LOSSES = (*DENSE, "push_pull", "bild", "topk_kl")
SMALL, *LARGER = HEADS
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"trained": False},
    {"mode": "no_grad"},
    {"mode": "none"},
    {"ignored": 0.15},
    {"ignored": 0.9},
)
QUICK = {
    ("bidirectional_kl", True),
    ("bidirectional_kl", False),
    ("jsd", True),
    ("cross_entropy", True),
    ("push_pull", False),
}
# what the bounds compare with
AGAINST = ("floor: bare products", "bidistill", "eager", "torch.compile", "trl")


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the cases of the whole matrix."""
    for mode in MODES:
        for loss in LOSSES:
            yield case_for(SMALL, loss, device, compiled=True, **mode)
    for head in LARGER:
        for loss in DENSE:
            every = device.type == "cuda" or loss == DENSE[0]
            for mode in MODES[: 1 + every]:
                yield case_for(head, loss, device, compiled=True, **mode)


def quick(case: Case, provider: Provider) -> bool:
    """Whether this belongs to what takes minutes.

    Of who computes but one KL the reverse one is left out: it costs what the forward one does.
    """
    plain = case.head == SMALL and case.mode == "mean" and not case.ignored
    return plain and (case.loss, case.trained) in QUICK and not provider.name.endswith("beta 1")


def targets(device: torch.device) -> Iterator[Case]:
    """Yield the cases of the bounds on a CPU: times at 1024 rows, memory at 8192."""
    for loss in (*DENSE, "push_pull"):
        shape = {"trained": loss != "push_pull"}
        yield case_for(SMALL, loss, device, N=1024, compiled=True, **shape)
        yield case_for(SMALL, loss, device, N=8192, timed=False, **shape)


def tiny_cases() -> Iterator[Case]:
    """Yield one case of each loss at sizes at which a time says nothing."""
    for loss in LOSSES:
        yield Case(loss, 8, 32, 1000, head=SMALL, dtype="float32")


def concerned(case: Case, provider: Provider) -> bool:
    """Whether a provider is one of those that the bounds are about: of memory alone we are."""
    if not case.timed:
        return provider.name == "bidistill, native"
    return provider.name.split(",")[0] in AGAINST and provider.name != "bidistill, torch"


def pairs(device_type: str, *, tiny: bool) -> Iterator[Any]:
    """Yield (case, provider's name), the providers of a case one after the other."""
    device = torch.device(device_type)
    for case in tiny_cases() if tiny else cases(device):
        for provider in suite(case, device_type):
            yield _test(case, provider, [pytest.mark.quick] * quick(case, provider))
    for case in () if tiny or device_type != "cpu" else targets(device):
        for provider in suite(case, device_type):
            if concerned(case, provider):
                yield _test(case, provider, [pytest.mark.targets])


def _test(case: Case, provider: Provider, marks: list[pytest.MarkDecorator]) -> Any:
    return pytest.param(case, provider.name, marks=marks, id=f"{case.name}-{provider.name}")


def bench_loss(case: Case, provider: str, measure: Callable, replay: Callable) -> None:
    replay(measure(case, provider, suite))

"""Measure the cases: errors and memory first, then times in turn; one JSON record a line.

    python -m bench.gpu.measure --records FILE --plan main|middle [--dry-run] ...

A provider whose gradients are wrong gets no time, its errors are its result. The others are timed
in turns: each is sampled a little, then the next, then the first again, so that a device that
grows warm or slow does so for all of them. Started by `bench.gpu`, which sets the time limit.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu import cases, floor
from bench.gpu.cases import Case
from bench.gpu.meter import (
    Budget,
    CudaMeter,
    DryMeter,
    Meter,
    TimeLimit,
    forget,
    quantile,
    time_limit,
)
from bench.gpu.providers import Provider, providers

PROVIDER_S = 45.0  # to build, check and weigh one provider: torch.compile takes most of it
CRASHED = 3  # exit status: the device no longer answers, only a new process can go on


def plan(name: str, *, dry: bool) -> list[Case]:
    """Return the cases, the most wanted first."""
    D, V = (64, 1000) if dry else (4096, 128256)
    large, middle, small = (12, 8, 6) if dry else (8192, 4096, 1024)
    kl, jsd = "bidirectional_kl", "jsd"
    if name == "middle":
        return [
            Case(loss, middle, D, V, trained) for trained in (True, False) for loss in (kl, jsd)
        ]
    return [
        Case(kl, large, D, V, compiled=not dry),
        Case(jsd, large, D, V, compiled=True),
        Case(jsd, small, D, V),
        Case(kl, small, D, V),
        Case(kl, large, D, V, trained=False),
        Case(jsd, large, D, V, trained=False),
        Case(jsd, small, D, V, trained=False),
        Case(kl, small, D, V, trained=False),
        Case(kl, large, D, V, mode="no_grad"),
        Case(kl, large, D, V, mode="none"),
        Case(kl, large, D, V, ignored=0.15),
        Case(kl, large, D, V, ignored=0.9),
        Case("push_pull", large, D, V),
        Case("push_pull", large, D, V, trained=False),
        Case("cross_entropy", large, D, V),
        Case(kl, small, D, V, near=False, timed=False),
        Case(jsd, small, D, V, near=False, timed=False),
    ]


def reason(error: BaseException) -> tuple[str, str]:
    """Put an exception into a status and a message."""
    message = f"{type(error).__name__}: {error}".strip()[:500]
    if TimeLimit.__name__ in message:  # the compiler wraps it into an error of its own
        return "time limit", message
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", message
    # a part of the library under test that cannot be found is no missing package
    if isinstance(error, ModuleNotFoundError) and "bidistill" not in str(error.name):
        return "not installed", message
    return "failed", message


def measure_case(
    case: Case,
    everybody: list[Provider],
    meter: Meter,
    budget: Budget,
    truth: Callable[..., cases.Truth] = cases.truth,
) -> list[dict[str, Any]]:
    """Check, weigh and time all providers of a case; one record each."""
    problem = cases.make_problem(case, meter.device)
    truths: dict[str, cases.Truth] = {}
    records, steps = [], {}
    for provider in everybody:
        record = _record(case, provider)
        records.append(record)
        try:
            with time_limit(min(PROVIDER_S, budget.left())):
                if provider.checked and provider.loss not in truths:
                    truths[provider.loss] = truth(problem, provider.loss)
                step = provider.build(problem)
                found = step()
                if provider.checked and found is not None:
                    errors = cases.errors(*found, truths[provider.loss])
                    record |= {f"error_{k}": _plain(v) for k, v in errors._asdict().items()}
                    record["status"] = "wrong gradient" if errors.wrong else "right"
                del found
                if record["status"] == "right" and case.timed:
                    # the floor's buffers stand outside, its own peak would say nothing
                    record["peak_bytes"] = meter.peak_bytes(step) if provider.checked else None
                    steps[provider.name] = step
        except Exception as error:
            record["status"], record["error"] = reason(error)
            error.__traceback__ = None  # its frames hold tensors
        step = None
        _require_device(meter, provider.name)
        forget()
    truths.clear()
    forget()
    _time_in_turn(records, steps, meter, budget)
    return records


def _plain(error: float | None) -> float | str | None:
    """Return an error as JSON has it, which knows no NaN."""
    return error if error is None or math.isfinite(error) else str(error)


def _record(case: Case, provider: Provider) -> dict[str, Any]:
    computed = {} if provider.loss == case.loss else {"computes": provider.loss}
    head = {"kind": "case", "case": case.name, **case._asdict(), "provider": provider.name}
    result = {"status": "right", "floor_flops": floor.flops(case)}
    return {**head, **computed, **result, "samples_ms": []}


def _time_in_turn(
    records: list[dict[str, Any]], steps: dict[str, Any], meter: Meter, budget: Budget
) -> None:
    """Sample each step a little, in turn, and put the results into the records."""
    for turn in range(meter.turns):
        for record in records:
            step = steps.get(record["provider"])
            if step is None:
                continue
            try:
                with time_limit(budget.left()):
                    about_ms = quantile(record["samples_ms"], 0.5)
                    record["samples_ms"] += meter.samples_ms(step, about_ms)
            except Exception as error:
                del steps[record["provider"]]
                status, record["error"] = reason(error)
                # what was sampled in earlier turns counts
                record["status"] = record["status"] if turn and record["samples_ms"] else status
                error.__traceback__ = None
            _require_device(meter, record["provider"])
    for record in records:
        samples = record["samples_ms"]
        for name, share in (("median_ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
            record[name] = quantile(samples, share)


def _require_device(meter: Meter, provider: str) -> None:
    """Leave at once if a kernel broke the device for this process."""
    message = meter.broken()
    if message is not None:
        raise DeviceLost(provider, message)


class DeviceLost(Exception):
    """After this provider every later call of the process would fail with the same error."""


def device_record(meter: Meter) -> dict[str, Any]:
    """Describe the device as PyTorch sees it."""
    record: dict[str, Any] = {"kind": "device", "type": meter.device.type}
    if meter.device.type == "cuda":
        found = torch.cuda.get_device_properties(meter.device)
        record |= {"name": found.name, "memory_bytes": found.total_memory}
        record |= {"capability": [found.major, found.minor], "sms": found.multi_processor_count}
        record["cuda"] = torch.version.cuda
    return record


def run(arguments: argparse.Namespace, meter: Meter) -> Iterator[dict[str, Any]]:
    """Yield the records of a plan."""
    budget = Budget(arguments.seconds)
    yield device_record(meter)
    yield {"kind": "ceilings", "when": f"before {arguments.plan}", **meter.ceilings()._asdict()}
    for at, case in enumerate(plan(arguments.plan, dry=meter.dry)):
        if at < arguments.skip or arguments.cases not in case.name:
            continue
        if budget.left() < 5:
            yield {"kind": "not reached", "case": case.name, "status": "time limit"}
            continue
        print(f"  {case.name}", flush=True)
        everybody = providers(case, arguments.backend)
        if at == arguments.skip:
            everybody = [p for p in everybody if p.name not in arguments.without]
        try:
            yield from measure_case(case, everybody, meter, budget)
        except DeviceLost as error:
            provider, message = error.args
            lost = {"case": case.name, "at": at, "provider": provider, "error": message}
            yield {"kind": "device lost", **lost}
            return
        except Exception as error:
            status, message = reason(error)
            yield {"kind": "not reached", "case": case.name, "status": status, "error": message}
        forget()
    yield {"kind": "ceilings", "when": f"after {arguments.plan}", **meter.ceilings()._asdict()}


def arguments_of(description: str) -> argparse.ArgumentParser:
    """Return the options that all measuring steps have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=Path, required=True, help="file to append records to")
    parser.add_argument("--seconds", type=float, default=300.0, help="time there is")
    parser.add_argument("--backend", default="triton", help="of the library under test")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, CPU, no clock")
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    return parser


def main() -> None:
    """Write the records of a plan."""
    parser = arguments_of("Measure the cases.")
    parser.add_argument("--plan", choices=("main", "middle"), default="main")
    parser.add_argument("--skip", type=int, default=0, help="cases that are done already")
    parser.add_argument("--without", nargs="*", default=[], help="left out of the first case")
    arguments = parser.parse_args()
    # fp32 products are IEEE's: the truth of a comparison must not be a coarse one
    torch.backends.cuda.matmul.allow_tf32 = False
    lost = False
    with arguments.records.open("a") as file:
        for record in run(arguments, DryMeter() if arguments.dry_run else CudaMeter()):
            file.write(json.dumps(record) + "\n")
            file.flush()
            lost = record["kind"] == "device lost"
    sys.exit(CRASHED if lost else 0)


if __name__ == "__main__":
    main()

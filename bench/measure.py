"""Measure one case: errors and memory of every provider first, then times in turn.

A provider whose gradients are wrong gets no time, its errors are its result. The others are timed
in turns: each is sampled a little, then the next, then the first again, so that a device that
grows warm or slow does so for all of them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from bench import cases, floor
from bench.cases import Case
from bench.meter import Budget, Meter, TimeLimit, forget, quantile, time_limit
from bench.providers import Provider

PROVIDER_S = 45.0  # to build, check and weigh one provider: torch.compile takes most of it


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

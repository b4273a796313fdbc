"""Measure one case: errors and memory of every provider first, then times in turn.

A provider whose gradients are wrong gets no time, its errors are its result. The others are timed
in turns: each is sampled a little, then the next, then the first again, so that a device that
grows warm or slow does so for all of them.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench import cases, floor
from bench.cases import Case
from bench.meter import Budget, Ceilings, Meter, Step, TimeLimit, forget, quantile, time_limit
from bench.provider import NotInstalled, NotOffered, Provider

Record = dict[str, Any]
QUANTILES = {"median_ms": 0.5, "p20_ms": 0.2, "p80_ms": 0.8, "min_ms": 0.0}


class NoMemory(Exception):
    """A case needs more memory than the device has."""


def reason(error: BaseException) -> tuple[str, str]:
    """Put an exception into a status and a message."""
    message = f"{type(error).__name__}: {error}".strip()[:500]
    if TimeLimit.__name__ in message:  # the compiler wraps it into an error of its own
        return "time limit", message
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
        return "out of memory", message
    # written for people, by us
    if isinstance(error, NoMemory):
        return "out of memory", str(error)
    if isinstance(error, NotInstalled):
        return "not installed", str(error)
    if isinstance(error, NotOffered):
        return "not offered", str(error)
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
) -> list[Record]:
    """Check, weigh and time all providers of a case; one record each."""
    records = [_record(case, provider) for provider in everybody]
    try:
        _require_memory(case, meter)
        problem = cases.make_problem(case, meter.device)
    except Exception as error:
        status, message = reason(error)
        return [record | {"status": status, "error": message} for record in records]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other projects' warnings are theirs
        pairs = zip(everybody, records, strict=True)
        steps = _check_all(problem, pairs, meter, budget, truth)
        time_in_turn(records, steps, meter, budget)
    return records


def _require_memory(case: Case, meter: Meter) -> None:
    """Refuse a case that the device has no room for, before anything is allocated."""
    needs, got = cases.needed_bytes(case), meter.free_bytes()
    if got is not None and needs > got:
        raise NoMemory(f"got {got / 1e9:.1f} GB of free memory, needs {needs / 1e9:.1f} GB")


def _check_all(
    problem: cases.Problem,
    pairs: Iterable[tuple[Provider, Record]],
    meter: Meter,
    budget: Budget,
    truth: Callable[..., cases.Truth],
) -> dict[str, Step]:
    """Compare with the truth and weigh; return the steps that deserve a time."""
    truths: dict[str, cases.Truth] = {}
    steps = {}
    for provider, record in pairs:
        try:
            with time_limit(min(budget.provider_s, budget.left())):
                if provider.checked and provider.loss not in truths:
                    truths[provider.loss] = truth(problem, provider.loss)
                step = provider.build(problem)
                _check(provider, step(), truths, record)
                if record["status"] == "right":
                    # the floor's buffers stand outside, its own peak would say nothing
                    record["peak_bytes"] = meter.peak_bytes(step) if provider.checked else None
                    if problem.case.timed:
                        steps[provider.name] = step
        except Exception as error:
            record["status"], record["error"] = reason(error)
            error.__traceback__ = None  # its frames hold tensors
        step = None
        _require_device(meter, provider.name)
        forget()
    return steps


def _check(
    provider: Provider,
    found: tuple[torch.Tensor, list[torch.Tensor]] | None,
    truths: dict[str, cases.Truth],
    record: Record,
) -> None:
    """Put the errors of a result into its record."""
    if not provider.checked or found is None:
        return
    errors = cases.errors(*found, truths[provider.loss])
    record |= {f"error_{k}": _plain(v) for k, v in errors._asdict().items()}
    record["gradient_bytes"] = sum(gradient.nbytes for gradient in found[1])
    record["status"] = "wrong gradient" if errors.wrong else "right"


def _plain(error: float | None) -> float | str | None:
    """Return an error as JSON has it, which knows no NaN."""
    return error if error is None or math.isfinite(error) else str(error)


def _record(case: Case, provider: Provider) -> Record:
    """Return the record of a provider before anything is known."""
    computed = {} if provider.loss == case.loss else {"computes": provider.loss}
    head = {"kind": "case", "case": case.name, **case._asdict(), "provider": provider.name}
    run = {"status": "right", "seed": case.seed, "threads": torch.get_num_threads()}
    work = {"floor_flops": floor.flops(case), "bytes_moved": floor.bytes_moved(case)}
    unknown = ("error_loss", "error_dx", "error_dw", "peak_bytes", "gradient_bytes")
    unknown += (*QUANTILES, "mm_share", "copy_share")
    return {**head, **computed, **run, **work, **dict.fromkeys(unknown), "samples_ms": []}


def time_in_turn(
    records: list[Record], steps: dict[str, Step], meter: Meter, budget: Budget
) -> None:
    """Sample each step a little, in turn, and put the results into the records."""
    for turn in range(meter.turns):
        # who comes after whom changes: a step may find in the cache what the last one read
        first = turn % len(records)
        for record in records[first:] + records[:first]:
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
        record |= {name: quantile(record["samples_ms"], at) for name, at in QUANTILES.items()}


def shares(record: Record, ceilings: Ceilings) -> Record:
    """Return the shares of the ceilings that a record's median reaches."""

    def share(work: float, ceiling: float | None) -> float | None:
        ms = record["median_ms"]
        return work / (ms * 1e-3) / ceiling if ms and ceiling else None

    return {
        "mm_share": share(record["floor_flops"], ceilings.mm_flops_per_s),
        "copy_share": share(record["bytes_moved"], ceilings.copy_bytes_per_s),
    }


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

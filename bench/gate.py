"""Regression gate: has time over the floor, or memory, become worse than bench/gate.json expects?

    python -m bench.gate                     # exit status 1 and a line for each case that is worse
    python -m bench.gate --write --runs 5    # measure what to expect

Compared are ratios to the bare matrix products, timed in turn with ours, never times: these differ
between machines and hours. Ratios do so less: the same kernels took from 0.86 to 1.11 of the floor
in different hours, in which the floor's time moved more than ours. So a quarter is allowed, or
twice the largest deviation among repeated runs if that is more: the gate finds gross losses, the
benchmarks the rest. A case beyond it is measured again a little later, up to three times, as a
neighbour on the machine may have slowed it down: what is slower by itself is so each time.
Ratios of another processor, instruction set or number of threads say nothing, so there the gate
compares nothing and says so.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pydantic
import torch

from bench import record
from bench.cases import HEADS, Case, Problem, Truth, truth
from bench.floor import floor
from bench.measure import measure_case
from bench.meter import Budget, CpuMeter
from bench.providers import ours
from bench.report.stored import times
from bidistill.files import write_text

EXPECTED = record.ROOT / "bench" / "gate.json"
AGAIN = 3
PAUSE_S = 20.0  # a neighbour that slows one measurement down may slow the next one, too
LEAST_TOLERANCE = 0.25  # between hours and hosts; runs of one hour cannot show it
MOST_TOLERANCE = 0.5  # a noisier machine has nothing to say
MEMORY_BYTES = 8 << 20  # what the allocator's own pages may add to a peak
TURNS = 15  # of a step of a fifth of a second; fewer leave the ratio to chance
CASE_S = 60.0  # a case takes about ten
LOSSES = ("bidirectional_kl", "jsd", "cross_entropy", "push_pull")
HEAD = "SmolLM2-135M"
# 128 rows are one chunk; of 512 the head's gradient is a sum over chunks
SIZES = [(loss, 128) for loss in LOSSES] + [(LOSSES[0], 512)]
CASES = [
    Case(loss, N, *HEADS[HEAD], trained=loss != "push_pull", head=HEAD, dtype="float32")
    for loss, N in SIZES
]


class Measured(NamedTuple):
    """One measurement of a case."""

    ratio: float
    """Time over the floor's, the median over turns."""
    peak_bytes: int
    """Memory beyond the inputs."""


class Unmeasured(Exception):
    """A case gave no ratio: wrong, failed, or out of time."""


class Bound(pydantic.BaseModel, extra="forbid"):
    """What is expected of a case."""

    ratio: float = pydantic.Field(gt=0, allow_inf_nan=False)
    tolerance: float = pydantic.Field(ge=0, allow_inf_nan=False)
    peak_bytes: int = pydantic.Field(gt=0)
    runs: list[float] = []
    """The ratios that the other two were taken from."""

    @property
    def most(self) -> Measured:
        """The largest values that pass."""
        return Measured(self.ratio * (1 + self.tolerance), self.peak_bytes + MEMORY_BYTES)


class Expected(pydantic.BaseModel, extra="forbid"):
    """What bench/gate.json holds."""

    isa: str
    processor: str
    processors: int
    threads: int
    commit: str | None
    dirty: bool | None
    command: str
    cases: dict[str, Bound]


Measure = Callable[[Case], Measured]
_TRUTHS: dict[Case, Truth] = {}


def measure(case: Case) -> Measured:
    """Measure a case with the native back-end on the CPU."""
    everybody = [floor(case), ours(case, "native")]
    records = measure_case(case, everybody, CpuMeter(TURNS), Budget(CASE_S), truth=_known_truth)
    for one in records:
        if one["status"] != "right" or one["median_ms"] is None:
            said = " ".join(f"{one['status']} {one.get('error') or ''}".split())
            raise Unmeasured(f"{case.name}: no ratio, {one['provider']}: {said[:200]}")
    bare, own = records
    if own["peak_bytes"] is None:
        raise Unmeasured(f"{case.name}: no peak memory, /proc/self/clear_refs cannot be written")
    # within turns: what slows a turn down slows both
    spread = times(own, bare)
    assert spread is not None, "both have a median"
    return Measured(spread.middle, own["peak_bytes"])


def _known_truth(problem: Problem, loss: str) -> Truth:
    """Compute the truth of a case once, however often it is measured: its inputs are the same."""
    if problem.case not in _TRUTHS:
        _TRUTHS[problem.case] = truth(problem, loss)
    return _TRUTHS[problem.case]


def native_isa() -> str | None:
    """Return the instruction set of the native library; None if there is no library."""
    from bidistill_kernels._native.library import load

    library = load().library
    return None if library is None else library.bd_isa().decode()


def incomparable(expected: Expected, isa: str | None, threads: int) -> str | None:
    """Say why there is nothing to compare with, if so."""
    if isa is None:
        return "no native library here"
    here = {"isa": isa, "threads": threads, "processor": record.processor()["processor"]}
    for name, found in here.items():
        if (wanted := getattr(expected, name)) != found:
            return f"{name} {found} here, {wanted} expected"
    return None


def compare(expected: Expected, cases: Sequence[Case], measure: Measure) -> list[str]:
    """Measure all cases; return a line for each that is worse."""
    worse = []
    for case in cases:
        try:
            found = _best(case, expected.cases[case.name].most, measure)
        except Unmeasured as error:
            worse.append(str(error))
            continue
        line = _worse(case, found, expected.cases[case.name])
        worse += [line] if line else []
        print(f"{case.name}: {found.ratio:.3f} x floor, {found.peak_bytes >> 20} MiB", flush=True)
    return worse


def _best(case: Case, most: Measured, measure: Measure) -> Measured:
    """Return the least of time and of memory; measure again only while one is beyond its bound."""
    best = measure(case)
    for _ in range(AGAIN):
        if best.ratio <= most.ratio and best.peak_bytes <= most.peak_bytes:
            break
        time.sleep(PAUSE_S)
        again = measure(case)
        peak = min(best.peak_bytes, again.peak_bytes)
        best = Measured(min(best.ratio, again.ratio), peak)
    return best


def _worse(case: Case, found: Measured, bound: Bound) -> str | None:
    most, said = bound.most, []
    if found.ratio > most.ratio:
        said.append(f"got {found.ratio:.3f} x floor, expected at most {most.ratio:.3f}")
    if found.peak_bytes > most.peak_bytes:
        peaks = found.peak_bytes / 2**20, most.peak_bytes / 2**20
        said.append("got {:.1f} MiB, expected at most {:.1f}".format(*peaks))
    if not said:
        return None
    hint = (
        "look at what changed in kernels/, or run python -m bench.gate --write if that is intended"
    )
    return f"{case.name}: {'; '.join(said)}; {hint}"


def expect(cases: Sequence[Case], runs: int, measure: Measure) -> dict[str, Bound]:
    """Measure what to expect; all cases in each run, so that runs lie apart."""
    found: dict[str, list[Measured]] = {case.name: [] for case in cases}
    for _ in range(runs):
        for case in cases:
            found[case.name].append(measure(case))
            print(f"{case.name}: {found[case.name][-1].ratio:.3f} x floor", flush=True)
    return {name: _bound(all_runs) for name, all_runs in found.items()}


def _bound(measured: list[Measured]) -> Bound:
    ratios = [m.ratio for m in measured]
    middle = median(ratios)
    deviation = max(abs(ratio / middle - 1) for ratio in ratios)
    return Bound(
        ratio=round(middle, 4),
        tolerance=round(max(LEAST_TOLERANCE, 2 * deviation), 4),
        peak_bytes=max(m.peak_bytes for m in measured),
        runs=[round(ratio, 4) for ratio in ratios],
    )


def read(path: Path, cases: Sequence[Case]) -> Expected:
    """Read what is expected.

    Raises:
        ValueError: the file is missing, is not what the gate writes, or lacks a case.
    """
    again = "run python -m bench.gate --write"
    try:
        expected = Expected.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}: got {error.strerror}, expected a file; {again}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path.name}: {where}: {first['msg']}; {again}") from error
    missing = [case.name for case in cases if case.name not in expected.cases]
    if missing:
        raise ValueError(f"{path.name}: got no {missing[0]!r}; {again}")
    return expected


def main(arguments: Sequence[str] | None = None, measure: Measure = measure) -> int:
    parser = argparse.ArgumentParser("python -m bench.gate", description="Regression gate.")
    parser.add_argument("--write", action="store_true", help="measure what to expect")
    parser.add_argument("--runs", type=int, default=5, help="how often, for --write")
    parser.add_argument("--file", type=Path, default=EXPECTED, help="what is expected")
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error("--runs: got less than 2, expected some to deviate from each other")
    try:
        return _write(options, arguments, measure) if options.write else _check(options, measure)
    except (ValueError, Unmeasured) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace, measure: Measure) -> int:
    expected = read(options.file, CASES)
    reason = incomparable(expected, native_isa(), torch.get_num_threads())
    if reason:
        print(f"nothing to compare with: {reason}")
        return 0
    worse = compare(expected, CASES, measure)
    print(*worse, sep="\n", end="\n" * bool(worse))
    return int(bool(worse))


def _write(options: argparse.Namespace, arguments: Sequence[str] | None, measure: Measure) -> int:
    isa = native_isa()
    if isa is None:
        raise ValueError("no native library here, nothing can be measured; run pip install")
    said = sys.argv[1:] if arguments is None else arguments
    state, machine = record.commit(), record.environment()
    expected = Expected(
        isa=isa,
        processor=machine["processor"],
        processors=machine["processors"],
        threads=torch.get_num_threads(),
        commit=state["commit"],
        dirty=state["dirty"],
        command=shlex.join(["python", "-m", "bench.gate", *said]),
        cases=expect(CASES, options.runs, measure),
    )
    noisy = [name for name, bound in expected.cases.items() if bound.tolerance > MOST_TOLERANCE]
    if noisy:
        raise ValueError(
            f"{', '.join(noisy)}: got ratios that differ by more than {MOST_TOLERANCE / 2:.0%}, "
            "which would let everything pass; run it again when the machine is quiet"
        )
    write_text(options.file, expected.model_dump_json(indent=1) + "\n")
    print(f"{options.file}: {len(expected.cases)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())

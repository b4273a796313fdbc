"""Everything that needs a GPU, in one run: tests, peers and ourselves side by side, tuning.

    bench/gpu.sh [--dry-run]      # sets up the paths and calls this

Each step is a process of its own with a time limit inside the run's; one that fails or is cut off
leaves its records so far, and the rest goes on. The result file is rewritten after every step and
the table comes last. Exit status: 0 if every step ended well, the tests are green and the library
computed every case rightly; else 1.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench import record
from bench.gpu import table

CRASHED = 3  # of bench.gpu.measure: the device no longer answers that process
RELAUNCHES = 4
MEASURED = ("case", "tuning", "step")
PATIENCE_S = 8.0  # between asking a step to stop and ending it


class Step(NamedTuple):
    """One process of the run."""

    name: str
    module: list[str]
    limit_s: float
    least_s: float = 15.0
    """Not started with less time left."""


def steps(dry: bool) -> list[Step]:
    """Return the steps in order; with the limits a full run stays under nine minutes."""
    tests = "tests/kernels/test_transform.py" if dry else "tests/kernels"
    workers = ["-n", "6"] if find_spec("xdist") and not dry else []
    pytest = ["pytest", tests, "-q", "--no-header", "-p", "no:cacheprovider", *workers]
    # compiles for all targets and needs no GPU: not on a machine that is paid for its GPU
    pytest += ["--ignore-glob=*/test_compile.py"]
    return [
        Step("tests", pytest, 140),
        Step("main", ["bench.gpu.measure", "--plan", "main"], 270),
        Step("tuning", ["bench.gpu.tuning"], 60),
        Step("steps", ["bench.gpu.whole_steps"], 60, least_s=40),
        Step("middle", ["bench.gpu.measure", "--plan", "middle"], 100, least_s=40),
    ]


class Run:
    """A run: its folder for temporary files, its result file, the end of its time."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + options.seconds
        known = record.environment()
        self.file = record.ResultFile(known, dry=options.dry_run, backend=options.backend)
        print(json.dumps(known, indent=1), flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def do(self, step: Step) -> None:
        """Run a step and put what it found into the result file."""
        state: dict[str, Any] = {"status": "done"}
        self.file.content["steps"][step.name] = state
        limit = min(step.limit_s, self.left() - PATIENCE_S)
        start = time.monotonic()
        if limit < step.least_s:
            state["status"] = "no time was left"
        else:
            print(f"== {step.name} (at most {limit:.0f} s)", flush=True)
            try:
                (self._test if step.name == "tests" else self._measure)(step, limit, state)
            except Exception as error:
                state |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            if not self.options.dry_run:
                state["wall_s"] = round(time.monotonic() - start, 1)
        self.file.content["goals"] = table.goals(self.file.content)
        self.file.write()
        print(f"== {step.name}: {state['status']} {state.get('error', '')}", flush=True)

    def _process(self, command: list[str], limit: float, **streams: Any) -> int | None:
        """Run a process; return its exit status, None if it was cut off."""
        process = subprocess.Popen(command, cwd=record.ROOT, start_new_session=True, **streams)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            # pytest writes its report when it is interrupted
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            return None
        finally:
            # its workers too, also when this process is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _test(self, step: Step, limit: float, state: dict[str, Any]) -> None:
        report, log = self.folder / "tests.xml", self.folder / "tests.log"
        command = [sys.executable, "-m", *step.module, f"--junitxml={report}"]
        with log.open("w") as file:
            status = self._process(command, limit, stdout=file, stderr=subprocess.STDOUT)
        print(log.read_text(errors="replace")[-3000:], flush=True)
        found = _counts(report)
        # 1 is pytest's word for tests that failed: the step did what it should
        if status not in (0, 1):
            state["status"] = "time limit" if status is None else f"exit status {status}"
        red = status != 0 or not found.get("passed")
        tail = log.read_text(errors="replace")[-4000:] if red else ""
        known = {"red": red, "finished": status in (0, 1), "tail": tail}
        self.file.content["tests"] = found | known

    def _measure(self, step: Step, limit: float, state: dict[str, Any]) -> None:
        records, end = self.folder / f"{step.name}.jsonl", time.monotonic() + limit
        extra: list[str] = []
        for launch in range(RELAUNCHES + 1):
            left = end - time.monotonic()
            command = [sys.executable, "-m", *step.module, "--records", str(records)]
            command += ["--seconds", str(left - PATIENCE_S), "--backend", self.options.backend]
            command += ["--dry-run"] * self.options.dry_run + extra
            if self.options.cases:
                command += ["--cases", self.options.cases]
            log = self.folder / f"{step.name}-{launch}.log"
            with log.open("w") as file:
                status = self._process(command, left, stderr=file)
            found = _lines(records)
            if status != CRASHED or end - time.monotonic() < step.least_s:
                break
            lost = found[-1]
            extra = ["--skip", str(lost["at"]), "--without", lost["provider"]]
        self.file.content["records"] += [{"step": step.name, **found_one} for found_one in found]
        if status != 0:
            state["status"] = "time limit" if status is None else "failed"
            state["error"] = log.read_text(errors="replace")[-2000:]
        elif not self.options.cases and not any(r["kind"] in MEASURED for r in found):
            state |= {"status": "failed", "error": "nothing was measured"}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole records of a file; the last may be cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _counts(report: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, and the names of the red ones."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    red = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [f"{c.get('classname')}::{c.get('name')}" for c in red]
    passed = len(cases) - len(red) - skipped
    return {"passed": passed, "failed": len(red), "skipped": skipped, "red_tests": names[:50]}


def main() -> int:
    """Run all steps and print the table."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Tests, timings and tuning.")
    parser.add_argument("--dry-run", action="store_true", help="CPU, tiny shapes, no times")
    parser.add_argument("--seconds", type=float, default=525.0, help="time for the whole run")
    parser.add_argument("--steps", default="tests,main,tuning,steps,middle", help="steps to run")
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    parser.add_argument("--backend", default="triton", help="of the library under test")
    options = parser.parse_args()
    if not (options.dry_run or _has_cuda()):
        parser.error("no CUDA device: got none, expected one; pass --dry-run for a rehearsal")
    # ends the step in work as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        for step in steps(options.dry_run):
            if step.name in options.steps.split(","):
                run.do(step)
        print(table.text(run.file.content))
        print(f"result file: {run.file.path}")
        return 0 if _well(run.file.content) else 1


def _has_cuda() -> bool:
    """Whether there is a device to measure; asked of a process that ends and frees it."""
    ask = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask]).returncode == 0


def _well(content: dict[str, Any]) -> bool:
    """Whether all steps ended well, no test is red, and we ourselves computed what was asked."""
    ours = [r["status"] for r in content["records"] if r.get("provider") == table.OURS]
    ended = all(state["status"] == "done" for state in content["steps"].values())
    return ended and not content["tests"].get("red") and set(ours) <= {"right"}


if __name__ == "__main__":
    sys.exit(main())

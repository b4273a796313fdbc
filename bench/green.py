"""Tests that must be green before anything is timed: nobody needs the speed of a wrong result."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.record import ROOT

KERNEL_TESTS = ROOT / "tests" / "kernels"
# tests are named after the back-end; those of one that is not timed tell nothing here
ABSENT = {"cpu": "triton", "cuda": "native"}


def tests_of(losses: Iterable[str]) -> list[Path]:
    """Return the test files of the losses and of the driver that they share.

    Example:
        >>> [path.name for path in tests_of(["jsd"])]
        ['test_jsd.py', 'test_lm_head.py']
    """
    own = {KERNEL_TESTS / f"test_{loss}.py" for loss in losses}
    # cross-entropy has no other tests than the driver's
    return sorted({*filter(Path.exists, own), KERNEL_TESTS / "test_lm_head.py"})


def complaint(tests: list[Path], device: str) -> str | None:
    """Run tests in a process of their own, as they are run anywhere; return the end of red output.

    Theirs are memory filled with NaN and Triton's interpreter, which have no place where time is
    taken. Exit status 5, no tests found, is red, too.
    """
    options = ["-q", "-x", "--no-header", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    options += ["-k", f"not {ABSENT[device]}"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, tests)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return None if run.returncode == 0 else (run.stdout + run.stderr)[-3000:]

"""What is measured on a device, and how: times, peak memory, the device's ceilings, time limits.

`CudaMeter` times with CUDA events by `triton.testing.do_bench`, which warms up and clears the cache
before each sample. `DryMeter` runs everything once on the CPU and has no clock: whatever
calls it cannot get a time, so a dry run has none to report.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

Step = Callable[[], Any]


class TimeLimit(Exception):
    """Something took longer than its share of the run."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the block once it has run this long; for the main thread."""
    if seconds <= 0:
        raise TimeLimit("no time was left")

    def ring(*_: object) -> None:
        raise TimeLimit(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Seconds that are left of a step."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Ceilings(NamedTuple):
    """What the device does at best, in this run."""

    copy_bytes_per_s: float | None
    """Device-to-device copy, bytes read plus bytes written."""
    mm_flops_per_s: float | None
    """Product of two large bf16 matrices of random numbers."""


class Meter(Protocol):
    """Device of a run and what can be measured on it."""

    device: torch.device
    dry: bool
    turns: int
    """How often each provider's turn comes."""

    def samples_ms(self, step: Step, about_ms: float | None = None) -> list[float]:
        """Time a step that has run before, and takes about so long; empty without a clock."""
        ...

    def peak_bytes(self, step: Step) -> int | None:
        """Return the memory a step needs beyond what is allocated already."""
        ...

    def ceilings(self) -> Ceilings:
        """Measure the ceilings."""
        ...

    def broken(self) -> str | None:
        """Tell why the device no longer answers this process, if so: a kernel broke it."""
        ...


class CudaMeter:
    """Times and memory of a CUDA device."""

    dry, turns = False, 3

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def samples_ms(self, step: Step, about_ms: float | None = None) -> list[float]:
        from triton.testing import do_bench

        once_ms = about_ms or self._once_ms(step)
        # a turn is about four samples of a long step; do_bench's own default of 100 ms would take
        # one of a 100 ms step
        rep = min(max(30.0, 4 * once_ms), 600.0)
        return list(do_bench(step, warmup=1, rep=rep, return_mode="all"))  # pyright: ignore

    def _once_ms(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, step: Step) -> int | None:
        forget()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def ceilings(self) -> Ceilings:
        n = 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        mm_ms = median(self.samples_ms(lambda: a @ b))
        source = torch.empty(1 << 31, device=self.device, dtype=torch.int8).random_()
        target = torch.empty_like(source)
        copy_ms = median(self.samples_ms(lambda: target.copy_(source)))
        return Ceilings(2 * source.nbytes / copy_ms * 1e3, 2 * n**3 / mm_ms * 1e3)

    def broken(self) -> str | None:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error)[:300]
        return None


class DryMeter:
    """The CPU, and no clock."""

    dry, turns = True, 1

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def samples_ms(self, step: Step, about_ms: float | None = None) -> list[float]:
        step()
        return []

    def peak_bytes(self, step: Step) -> int | None:
        return None

    def ceilings(self) -> Ceilings:
        return Ceilings(None, None)

    def broken(self) -> str | None:
        return None


def quantile(samples: list[float], share: float) -> float | None:
    """Return a quantile by linear interpolation; None of no samples."""
    if not samples:
        return None
    return torch.tensor(samples, dtype=torch.float64).quantile(share).item()


def forget() -> None:
    """Return memory that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

"""What is measured on a device, and how: times, peak memory, the device's ceilings, time limits.

`CpuMeter` reads a clock and the high-water mark of resident memory. `CudaMeter` times with CUDA
events by `triton.testing.do_bench`, which warms up and clears the cache before each sample.
`DryMeter` runs everything once on the CPU and has no clock: whatever calls it cannot get a time, so
a dry run has none to report.
"""

import ctypes
import gc
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

Step = Callable[[], Any]
PROC = Path("/proc")
MEMORY_SHARE = 0.95  # of what is free, that a run on the CPU may take


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
    """Seconds that are left of a run, and what one provider of a case may take of them.

    To be built, checked and weighed, that is: torch.compile takes most of it.
    """

    def __init__(self, seconds: float, provider_s: float = 45.0) -> None:
        self.end = time.monotonic() + seconds
        self.provider_s = provider_s

    def left(self) -> float:
        return self.end - time.monotonic()


class Ceilings(NamedTuple):
    """What the device does at best, in this run."""

    copy_bytes_per_s: float | None
    """Copy within the device's memory, bytes read plus bytes written."""
    mm_flops_per_s: float | None
    """Product of two large matrices of random numbers: bf16 on a GPU, fp32 on a CPU."""


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

    def free_bytes(self) -> int | None:
        """Return how much memory can be allocated; None if that is not known."""
        ...

    def broken(self) -> str | None:
        """Tell why the device no longer answers this process, if so: a kernel broke it."""
        ...


class CpuMeter:
    """Times and memory of the CPU, with the threads that PyTorch takes by itself."""

    dry = False
    LONG_MS = 50.0  # a step that takes longer is sampled once a turn, others until they took this

    def __init__(self, turns: int = 7) -> None:
        self.device, self.turns = torch.device("cpu"), turns
        # (M, K, N): a chunk's projection on a head, its gradient, and a square
        self.products: tuple[tuple[int, int, int], ...]
        self.products = (512, 576, 49152), (512, 49152, 576), (2048, 2048, 2048)
        self.copied_bytes = 512 << 20  # larger than any cache

    def samples_ms(self, step: Step, about_ms: float | None = None) -> list[float]:
        once_ms = about_ms or self._once_ms(step)
        count = max(1, min(20, round(self.LONG_MS / once_ms)))
        if count > 1:
            step()  # what is short suffers from the cache that another provider left
        return [self._once_ms(step) for _ in range(count)]

    def _once_ms(self, step: Step) -> float:
        start = time.perf_counter()
        result = step()
        took_ms = (time.perf_counter() - start) * 1e3
        del result  # to free it is not part of the step
        return took_ms

    def peak_bytes(self, step: Step) -> int | None:
        forget()
        try:
            before = _resident("VmRSS")
            # from now on the high-water mark is what is resident
            (PROC / "self/clear_refs").write_text("5")
        except OSError:
            return None
        result = step()  # gradients are held, so they count
        peak = _resident("VmHWM")
        del result
        return max(0, peak - before)

    def ceilings(self) -> Ceilings:
        rates = []
        for M, K, N in self.products:
            a, b, out = torch.randn(M, K), torch.randn(K, N), torch.empty(M, N)
            ms = self._median_ms(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            rates.append(2 * M * K * N / ms * 1e3)
        source = torch.randint(256, (self.copied_bytes,), dtype=torch.uint8)
        target = torch.empty_like(source)
        copy_ms = self._median_ms(lambda: target.copy_(source))
        return Ceilings(2 * source.nbytes / copy_ms * 1e3, max(rates))

    def _median_ms(self, step: Step) -> float:
        step()
        return median(self._once_ms(step) for _ in range(7))

    def free_bytes(self) -> int | None:
        try:
            return _kilobytes((PROC / "meminfo").read_text(), "MemAvailable")
        except OSError:
            return None

    def broken(self) -> str | None:
        return None

    def limit_memory(self) -> None:
        """Let the allocator refuse what the machine does not have, as a GPU's does.

        Otherwise the kernel lends it, and ends the whole run when it is used.
        """
        free = self.free_bytes()
        if free is not None:
            most = int(MEMORY_SHARE * free) + _resident("VmData")
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _resident(mark: str) -> int:
    return _kilobytes((PROC / "self/status").read_text(), mark)


def _kilobytes(text: str, name: str) -> int:
    """Return a line of /proc in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise OSError(f"no {name} among {text.count(chr(10))} lines")
    return int(found[1]) << 10


class CudaMeter:
    """Times and memory of a CUDA device."""

    dry, turns = False, 3

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        # fp32 products are IEEE's: the truth of a comparison must not be a coarse one
        torch.backends.cuda.matmul.allow_tf32 = False

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

    def free_bytes(self) -> int | None:
        forget()
        return torch.cuda.mem_get_info(self.device)[0]

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

    def free_bytes(self) -> int | None:
        return None

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
    with suppress(OSError, AttributeError):  # another C library has none
        ctypes.CDLL(None).malloc_trim(0)

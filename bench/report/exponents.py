"""What grows with what: time and memory against N, V and D, with fitted exponents.

A line is a loss and a provider along one of the sizes, the other two fixed. On logarithmic axes a
power law is straight and its slope is the exponent: 1 if twice the size costs twice as much, 0 if
size does not matter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.report import stored
from bench.report.stored import Record

SIZES = "NVD"
LEAST = 3  # points; two always lie on a line


class Line(NamedTuple):
    """A provider along one size."""

    loss: str
    provider: str
    size: str
    """"N", "V" or "D"."""
    fixed: str
    """The others, in words."""
    records: list[Record]
    """Sorted by size; only what is right."""

    def points(self, quantity: str) -> tuple[list[float], list[float]]:
        """Sizes and values of "ms" or "bytes", without those a logarithm does not know."""
        value = stored.extra_bytes if quantity == "bytes" else lambda r: r.get("median_ms")
        known = [(r[self.size], v) for r in self.records if (v := value(r)) is not None and v > 0]
        return [float(x) for x, _ in known], [float(y) for _, y in known]


class Fit(NamedTuple):
    """y is proportional to x**exponent."""

    exponent: float
    error: float
    """Standard error of the exponent."""

    def __str__(self) -> str:
        return f"{round(self.exponent, 2) + 0.0:.2f} ± {self.error:.2f}"


def lines(records: list[Record]) -> list[Line]:
    """Find the lines among records of scaling, those of one provider by N, V, D."""
    found = []
    right = [r for r in records if r["kind"] == "scaling" and r["status"] == "right"]
    for loss, provider in dict.fromkeys((r["loss"], r["provider"]) for r in right):
        own = [r for r in right if (r["loss"], r["provider"]) == (loss, provider)]
        for size in SIZES:
            rest = [s for s in SIZES if s != size]
            for fixed in dict.fromkeys(tuple(r[s] for s in rest) for r in own):
                # of a case that was measured twice the last counts
                at = {r[size]: r for r in own if tuple(r[s] for s in rest) == fixed}
                if len(at) >= LEAST:
                    words = ", ".join(f"{s}={v}" for s, v in zip(rest, fixed, strict=True))
                    line = Line(loss, provider, size, words, [at[x] for x in sorted(at)])
                    found.append(line)
    return found


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """Fit a power law through positive points; None of too few.

    Example:
        >>> str(fit([1, 2, 4], [3, 6, 12]))
        '1.00 ± 0.00'
    """
    if len(xs) < LEAST:
        return None
    (exponent, _), covariance = np.polyfit(np.log(xs), np.log(ys), 1, cov=True)
    return Fit(float(exponent), float(covariance[0, 0] ** 0.5))

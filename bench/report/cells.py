"""Cells of the page's tables: numbers for people, and what stands where there is no number."""

import html
import re

from bench.report.stored import Record, Spread

UNKNOWN = "-"
MOST = 80  # letters of an error message


def duration(ms: float | None, device: str) -> str:
    """Time for people: seconds of a CPU, ms of a GPU, three digits."""
    if ms is None:
        return UNKNOWN
    value, unit = (ms / 1e3, "s") if device == "cpu" else (ms, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def size(count: float | None) -> str:
    """Bytes for people.

    Example:
        >>> size(96 * 2**20), size(3 * 2**30), size(None)
        ('96.0 MiB', '3.00 GiB', '-')
    """
    if count is None:
        return UNKNOWN
    value, unit = (count / 2**20, "MiB") if count < 2**30 else (count / 2**30, "GiB")
    return f"{value:.{1 if value >= 10 else 2}f} {unit}"


def error(value: float | str | None) -> str:
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else f"{value:.1e}"


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def cell(text: str) -> str:
    """Any text in a Markdown table, shown as it is."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in "\\|`*[]" else char for char in escaped)


def time(one: Record, device: str) -> str:
    """The time, or what came in its place."""
    if one.get("median_ms") is None:
        return cell(_status(one))
    low, high = (duration(one[key], device).split()[0] for key in ("p20_ms", "p80_ms"))
    return f"{duration(one['median_ms'], device)} ({low}-{high})"


def _status(one: Record) -> str:
    """Why there is no time."""
    if one["status"] == "right":
        return UNKNOWN
    if one["status"] == "wrong gradient":
        errors = [(k, one.get(f"error_{k}")) for k in ("loss", "dx", "dw")]
        names = {"loss": "loss", "dx": "dX", "dw": "dW"}
        known = [f"{names[k]} {error(value)}" for k, value in errors if value is not None]
        return "wrong gradient: error " + ", ".join(known)
    if one["status"] == "not installed" or not one.get("error"):
        return one["status"]
    # a message may name folders of the machine that it ran on
    message = re.sub(r"(?:/[\w.+-]+){2,}/", "", " ".join(one["error"].split()))
    return f"{one['status']}: {message[:MOST]}"


def number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def spread(found: Spread | None, form: str = ".2f") -> str:
    """A number and what lies around it.

    Example:
        >>> spread(Spread(1.07, 0.98, 1.12)), spread(Spread.of(1.0)), spread(None)
        ('1.07 (0.98-1.12)', '1.00', '-')
    """
    if found is None:
        return UNKNOWN
    middle, low, high = (format(value, form) for value in found)
    return middle if found.low == found.high else f"{middle} ({low}-{high})"

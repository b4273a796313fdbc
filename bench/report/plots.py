"""Pictures of stored results: one over everything in a file, and how it scales.

Files are the same bytes for the same results and the same matplotlib: no date, ids from a fixed
salt, letters as outlines. They name the result file and its SHA-256, so that stale ones are found.
The face is white, so that they can be read on dark pages.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import stored
from bench.report.exponents import SIZES, Line, fit, lines
from bench.report.stored import Record, Run, Spread

PLOTS = stored.RESULTS.parent / "plots"
# Okabe and Ito's colours, told apart by colour-blind people too; others stay grey in the overview
OURS, OURS_TOO, OTHER, FRAME = "#0072B2", "#56B4E9", "#9A9A9A", "#444444"
CYCLE = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#9A9A9A")
MARKERS = "sDv^<>"
ROW, GAP = 0.17, 1.8  # inches a bar, bars between cases
STEP = "unlearning step"


class Plot(NamedTuple):
    """A picture to be drawn."""

    name: str
    """Of the file."""
    results: Path
    """What is drawn."""
    caption: str
    draw: Callable[[], Any]
    """Returns a matplotlib figure."""

    @property
    def source(self) -> str:
        """Name the result file as it is now."""
        return f"{self.results.name}, SHA-256 {_digest(self.results)}"


def plots_of(run: Run) -> Iterator[Plot]:
    """Yield the pictures of a result file, without drawing them or importing matplotlib."""
    stem = run.path.stem
    shown = _panels(run)
    if shown:
        caption = f"run {run.letter}: time over the floor, of steps over eager's; lines: 20-80 %"
        yield Plot(f"{stem}-overview.svg", run.path, caption, partial(_overview, shown))
    found = lines(run.records)
    for loss in dict.fromkeys(line.loss for line in found):
        own = [line for line in found if line.loss == loss]
        caption = f"run {run.letter}: {loss}, time and memory against N, V and D"
        name = f"{stem}-scaling-{loss}.svg"
        yield Plot(name, run.path, caption, partial(_scaling, loss, own))


def is_of(plot: Plot, folder: Path = PLOTS) -> bool:
    """Tell whether a picture in a folder was drawn from the results as they are now."""
    return plot.source in (folder / plot.name).read_text(encoding="utf-8")


def save(plot: Plot, folder: Path = PLOTS) -> Path:
    """Draw a picture into a folder."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.hashsalt": "bidistill",
        "svg.fonttype": "path",
        "font.size": 8,
        "axes.edgecolor": FRAME,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    # not the style of whoever draws it
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **style}):
        figure = plot.draw()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / plot.name
        figure.savefig(path, metadata={"Date": None, "Source": plot.source})
        pyplot.close(figure)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _panels(run: Run) -> dict[str, list[list[Record]]]:
    """One case of each loss, head and N, in its plain form, and the steps by themselves."""
    found: dict[str, list[list[Record]]] = {}
    seen = set()
    for records in stored.groups(run.records, "case", "step"):
        one = records[0]
        loss = one.get("loss", STEP)
        key = (
            (loss, one["case"]) if loss == STEP else tuple(one[k] for k in ("loss", "V", "D", "N"))
        )
        plain = loss == STEP or (one["mode"] == "mean" and not one["ignored"])
        if plain and key not in seen and _bars(records):
            seen.add(key)
            found.setdefault(loss, []).append(records)
    return found


def _bars(records: list[Record]) -> list[tuple[Record, Spread | None]]:
    """Providers of a case with their ratio; empty if there is no ratio at all."""
    base = stored.base(records)
    known = [r for r in records if not stored.is_floor(r) and r["status"] != "not installed"]
    bars = [(r, stored.times(r, base)) for r in known]
    return bars if any(value for _, value in bars) else []


def _rows(cases: list[list[Record]]) -> float:
    """Height of a panel in bars."""
    return sum(len(_bars(records)) + GAP for records in cases)


def _overview(panels: dict[str, list[list[Record]]]) -> Any:
    """Draw panels two abreast; a bar is as thick in each."""
    from matplotlib import pyplot

    named = list(panels.items())
    pairs = [named[at : at + 2] for at in range(0, len(named), 2)]
    heights = [max(_rows(cases) for _, cases in pair) for pair in pairs]
    columns = min(2, len(named))
    figure, axes = pyplot.subplots(
        len(pairs),
        columns,
        figsize=(5.5 * columns, sum(ROW * height + 0.7 for height in heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for row, pair, height in zip(axes, pairs, heights, strict=True):
        for axis in row[len(pair) :]:
            axis.set_axis_off()
        for axis, (name, cases) in zip(row, pair, strict=False):
            _panel(axis, name, cases, height)
    return figure


def _panel(axis: Any, name: str, cases: list[list[Record]], height: float) -> None:
    """Draw the bars of a loss, from 1 on a logarithmic axis: the floor is where they start.

    A line through the end of a bar goes from 20 to 80 % of the turns.
    """
    ticks, y, most, least = [], 0.0, 1.0, 1.0
    for records in cases:
        words = stored.title(records[0]).removeprefix(f"{name} ")
        beside = axis.get_yaxis_transform()
        axis.text(0.01, y, words, transform=beside, va="center", weight="bold")
        for one, value in _bars(records):
            y += 1
            ticks.append((y, one["provider"] + stored.computes(one)))
            if value is None:
                axis.text(1.02, y, one["status"], va="center", color=FRAME, style="italic")
                continue
            middle, low, high = value
            axis.barh(y, middle - 1, left=1, height=0.8, color=_colour(one))
            axis.plot((low, high), (y, y), color=FRAME, linewidth=1)
            axis.text(max(high, 1) * 1.02, y, f"{middle:.2f}", va="center", color=FRAME)
            most, least = max(most, high), min(least, low)
        y += GAP
    axis.set_xscale("log")
    axis.set_xlim(least * 0.9, max(2.0, most * 1.35))
    axis.axvline(1, color=FRAME, linewidth=0.8)
    _plain_numbers(axis.xaxis, (1, 1.5, 2, 3, 5))
    axis.set_ylim(height - 0.8, -1)
    axis.set_yticks([at for at, _ in ticks], [words for _, words in ticks])
    axis.tick_params(axis="y", length=0)
    base = "eager's" if name == STEP else "the floor"
    axis.set_title(f"{name}: time over {base} (log scale)", loc="left")


def _plain_numbers(axis: Any, digits: Sequence[float], base: float = 10.0) -> None:
    """Label a logarithmic axis with numbers, not powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=base, subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colour(one: Record) -> str:
    if not stored.is_ours(one):
        return OTHER
    return OURS_TOO if one["provider"].endswith(", torch") else OURS


def _scaling(loss: str, found: list[Line]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(SIZES), figsize=(13, 7.5), layout="constrained")
    quantities = (("ms", "seconds within the run"), ("bytes", "MiB beyond inputs and gradients"))
    looks = _looks(found)
    for row, (quantity, label) in zip(axes, quantities, strict=True):
        for axis, size in zip(row, SIZES, strict=True):
            own = [line for line in found if line.size == size]
            for line in own:
                _draw_line(axis, line, quantity, looks[line.provider])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            _plain_numbers(axis.xaxis, (1,), base=2.0)
            _plain_numbers(axis.yaxis, (1, 2, 5))
            axis.set_xlabel(f"{size} ({own[0].fixed})" if own else size)
            axis.set_ylabel(label)
            axis.grid(alpha=0.25)
            if axis.has_data():
                axis.legend(title="exponent", frameon=False, fontsize=7)
    figure.suptitle(f"{loss}: time and memory against N, V and D", x=0.01, ha="left")
    return figure


def _looks(found: list[Line]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each provider, the same in every panel."""
    looks: dict[str, dict[str, Any]] = {}
    for provider in dict.fromkeys(line.provider for line in found):
        one = {"provider": provider}
        if stored.is_ours(one):
            looks[provider] = {"color": _colour(one), "marker": "o", "linewidth": 2}
        else:
            at = sum(look["marker"] != "o" for look in looks.values())
            colour, marker = CYCLE[at % len(CYCLE)], MARKERS[at % len(MARKERS)]
            looks[provider] = {"color": colour, "marker": marker, "linewidth": 1}
    return looks


def _draw_line(axis: Any, line: Line, quantity: str, look: dict[str, Any]) -> None:
    xs, ys = line.points(quantity)
    if not xs:
        return
    found = fit(xs, ys)
    label = line.provider + (f": {found}" if found else "")
    unit = 2**20 if quantity == "bytes" else 1e3
    shown = [y / unit for y in ys]
    axis.plot(xs, shown, label=label, markersize=4, **look)

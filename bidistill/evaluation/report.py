"""The report of a run: one HTML file that needs nothing else, and a Markdown table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidistill.errors import UserError
from bidistill.evaluation.axes import AXES, Axis
from bidistill.evaluation.figures import depth_bars, loss_curves, whisker
from bidistill.evaluation.pages import NBSP, html_page, percent, tagged
from bidistill.files import write_text
from bidistill.markdown import escaped, table

GROUP_TITLES = {
    "forget": "To forget, asked plainly",
    "forget/attack": "To forget, with the answer's start prefilled",
    "neighbor": "Neighbours never trained on",
    "neighbor_train": "Neighbours trained on",
    "retain": "General knowledge",
}


def render(run_dir: Path | str) -> Path:
    """Write ``report.html`` and ``report.md`` from the measurements of a run.

    Args:
        run_dir: folder with ``metrics.json``, ``items_before.jsonl``, ``items_after.jsonl`` and
            ``train_log.jsonl``.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: a file is missing or is not what a run writes.
    """
    run_dir = Path(run_dir)
    metrics = _read_metrics(run_dir / "metrics.json")
    before, after = (_read_lines(run_dir / f"items_{when}.jsonl") for when in ("before", "after"))
    rows = [_axis_row(axis, metrics["before"], metrics["after"]) for axis in AXES]
    content = {
        "verdict": verdict(rows),
        "rows": rows,
        "facts": _facts(metrics),
        "groups": _groups(before, after),
    }
    log = _read_lines(run_dir / "train_log.jsonl")
    path = run_dir / "report.html"
    loss, depths = loss_curves(log), depth_bars(metrics["before"], metrics["after"])
    write_text(path, html_page("report.html.j2", **content, depths=depths, loss=loss))
    write_text(run_dir / "report.md", _markdown(content, loss))
    return path


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say in words how a run went.

    Args:
        rows: one for each axis: title, ``met``, ``before`` and ``after`` with their ``text``, and
            ``goal_text``.

    Returns:
        ``good``: whether all goals that were measured are met, and at least one was; ``title``
        and ``detail``: sentences.
    """
    judged = [row for row in rows if row["met"] is not None]
    missed = [row for row in judged if not row["met"]]
    count = f"{len(judged) - len(missed)} of {len(judged)} goals met"
    if not judged:
        return {"good": False, "title": "Nothing to judge", "detail": "No goal was measured."}
    if not missed:
        title, shown = "Forgotten, and the rest is kept", judged
    else:
        title, shown = "Not there yet", missed
    listed = "; ".join(
        f"{row['title'].lower()}: {row['before']['text']} → {row['after']['text']}"
        + (f" (goal {row['goal_text']})" if missed else "")
        for row in shown
    )
    return {"good": not missed, "title": title, "detail": f"{count}. {_sentence(listed)}."}


def _sentence(text: str) -> str:
    """Start with a capital letter."""
    return text[:1].upper() + text[1:]


def _axis_row(axis: Axis, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One axis with both rates, as the tables and the plot need it."""
    first, second = axis.find(before), axis.find(after)
    goal = axis.goal(first)
    sign = "≤" if axis.good == "low" else "≥"
    return {
        "title": axis.title,
        "good": axis.good,
        "arrow": "↓" if axis.good == "low" else "↑",
        "goal": None if goal is None else 100 * goal,
        "goal_text": "" if goal is None else f"{sign}{NBSP}{percent(goal)}",
        "met": axis.met(first, second),
        "before": _measured(axis, before),
        "after": _measured(axis, after),
    }


def _measured(axis: Axis, summary: dict[str, Any]) -> dict[str, Any]:
    """A rate with count and interval; ``text`` for people."""
    rate, interval = axis.find(summary), whisker(axis.find(summary["ci95"]))
    return {
        "rate": rate,
        "text": percent(rate),
        "n": axis.find(summary["n"]),
        "whisker": interval,
        "interval_text": ""
        if interval is None
        else f"{interval[0]:.0f} to {interval[1]:.0f}{NBSP}%",
    }


def _facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run cost and what it was, as names and values."""
    shown = {
        "wall_seconds": ("Wall time", _duration),
        "train_seconds": ("Training time", _duration),
        "peak_rss_mib": ("Peak memory", lambda mib: f"{mib / 1024:.2f} GiB"),
        "seed": ("Seed", str),
        "model": ("Model", str),
        "commit": ("Commit", lambda commit: str(commit)[:12]),
    }
    facts = [(name, view(metrics[k])) for k, (name, view) in shown.items() if k in metrics]
    for key in ("versions", "train"):
        facts += [(name.replace("_", " "), str(v)) for name, v in metrics.get(key, {}).items()]
    return facts


def _duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def _groups(before: list[dict], after: list[dict]) -> list[dict[str, Any]]:
    """Replies before and after, side by side, by group; those that changed come first."""
    key = lambda item: (item["id"], str(item["depth"]), item["prefill"])  # noqa: E731
    old = {key(item): item for item in before}
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUP_TITLES}
    for item in after:
        if key(item) in old:
            attack = "" if item["depth"] == 0 else "/attack"
            pair = {"before": tagged(old[key(item)]), "after": tagged(item)}
            changed = pair["before"]["tags"] != pair["after"]["tags"]
            groups[item["group"] + attack].append({**item, **pair, "changed": changed})
    for name, pairs in groups.items():
        if not name.startswith("forget"):
            pairs.sort(key=lambda pair: not pair["changed"])
    return [
        {"title": title, "pairs": groups[name], "open": name == "forget"}
        for name, title in GROUP_TITLES.items()
        if groups[name]
    ]


def _markdown(content: dict[str, Any], loss: dict[str, Any] | None) -> str:
    """The same in short, for a pull request or a README."""
    head = content["verdict"]
    lines = [
        f"**{head['title']}.** {head['detail']}",
        "",
        _axes(content["rows"]),
    ]
    if loss:
        curves = [[c["name"], f"{c['first']:.3g}", f"{c['last']:.3g}"] for c in loss["curves"]]
        lines += ["", table(["objective", "first loss", "last loss"], curves)]
    lines += ["", table(["run", ""], [list(map(escaped, fact)) for fact in content["facts"]])]
    for group in content["groups"]:
        lines += _markdown_group(group)
    return "\n".join(lines) + "\n"


def _axes(rows: Sequence[dict[str, Any]]) -> str:
    """A row for each axis."""
    head = "axis", "good", "before", "n", "after", "n", "95 % interval after", "goal", "met"
    mark = {True: "yes", False: "**no**", None: ""}
    body = []
    for row in rows:
        counted = [str(row[when][key]) for when in ("before", "after") for key in ("text", "n")]
        judged = row["after"]["interval_text"], row["goal_text"], mark[row["met"]]
        body.append([row["title"], row["arrow"], *counted, *judged])
    return table(head, body)


def _markdown_group(group: dict[str, Any], most: int = 12) -> list[str]:
    """The first replies of a group; the page has them all."""
    shown = min(most, len(group["pairs"]))
    lines = ["", f"### {group['title']} (first {shown} of {len(group['pairs'])})", ""]
    rows = []
    for pair in group["pairs"][:most]:
        asked = pair["question"] + (f" → {pair['prefill']}" if pair["prefill"] else "")
        cells = asked, pair["before"]["text"], pair["after"]["text"]
        rows.append(list(map(escaped, cells)))
    return [*lines, table(["question", "before", "after"], rows)]


def _read_metrics(path: Path) -> dict[str, Any]:
    """``metrics.json`` with a summary before and one after."""
    metrics = _parse(path, _read(path))
    for when in ("before", "after"):
        if not isinstance(metrics, dict) or when not in metrics:
            raise UserError(
                f"{path}: {when}: got nothing, expected the rates of a model; a report compares "
                "two, before and after training"
            )
    return metrics


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON lines file."""
    lines = enumerate(_read(path).split("\n"), start=1)
    return [_parse(f"{path}:{number}", line) for number, line in lines if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: got '{error.strerror}', expected a file of the run; give the folder of a "
            "finished run"
        ) from error


def _parse(where: Path | str, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: got text that is not JSON ({error}); run it again") from error

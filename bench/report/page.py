"""Render bench/README.md and its pictures from stored results, and from nothing else.

    python -m bench.report            # writes the page and bench/plots/
    python -m bench.report --check    # exit status 1 and one line if they are out of step

The page needs no matplotlib, its pictures do; without it they are left as they are.
"""

import argparse
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench import record
from bench.gpu import table
from bench.measure import shares
from bench.report import ahead, exponents, goals, plots, stored
from bench.report.cells import UNKNOWN, cell, duration, error, number, percent, size, spread, time
from bench.report.stored import Record, Run

ROOT = record.ROOT
PAGE = stored.RESULTS.parent / "README.md"


def render(runs: Sequence[Run]) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    of = {kind: [run for run in runs if run.device == kind] for kind in ("cpu", "cuda")}
    return environment.get_template("README.md.j2").render(
        leads=[_lead(lead) for run in runs for lead in ahead.leads(run)],
        peers=", ".join(f"`{name}`" for name in ahead.compared(runs)) or "nobody",
        outcomes=[_outcome(outcome) for outcome in goals.outcomes(list(runs))] if of["cpu"] else [],
        captions={run.letter: caption(run) for run in runs},
        **{kind: [_section(run) for run in chosen] for kind, chosen in of.items()},
    )


def caption(run: Run) -> str:
    """Say what made a result file, on which machine."""
    known = run.content["environment"]
    program = "pytest" if "suite" in run.content else "bench/gpu.sh"
    command = shlex.join([program, *known["command"]]).replace(f"{ROOT}/", "")
    commit = f"commit {(known['commit'] or 'unknown')[:12]}"
    if known["dirty"] is not False:
        commit += (
            " (**dirty tree**)" if known["dirty"] else " (not known whether the tree was clean)"
        )
    machine = [known["processor"], f"{known['processors']} processors, {known['threads']} threads"]
    if run.device == "cuda" and known["device"]:
        machine.insert(0, known["device"]["name"])
    versions = [f"{name} {version}" for name, version in known["versions"].items() if version]
    words = [
        f"Run {run.letter}, [{run.path.name}](results/{run.path.name}): `{command}`",
        commit,
        run.content["started_utc"][:10],
        ", ".join(machine),
        f"Python {known['python']}, native library {known['native'] or 'absent'}",
        ", ".join(versions),
    ]
    return "; ".join(words) + "."


def ceilings(run: Run) -> str:
    """Say what the machine did at best, in a sentence."""
    copy, mm = run.ceilings
    if mm is None or copy is None:
        return "No ceilings were measured."
    drift = "measured once"
    if len(run.content["ceilings"]) > 1:
        drifts = run.drift(), run.drift("copy_bytes_per_s")
        drift = "the best of the run; within it they drifted by {:.0%} and {:.0%}".format(*drifts)
    return f"Ceilings: product {mm / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s; {drift}."


def _lead(lead: ahead.Lead) -> dict[str, str]:
    """A row of the first table."""
    best = lead.others[0]
    ours = "no result"
    if lead.ours is not None:
        ours = f"{_value(lead, lead.ours)} ({lead.ours['provider']})"
    also = "; ".join(_provider(r) for r in lead.others[1:])
    return {
        "run": lead.run.letter,
        "case": lead.case,
        "measure": lead.measure.name,
        "best": cell(_provider(best)),
        "theirs": _value(lead, best),
        "ours": ours,
        "times": spread(lead.times),
        "also": cell(also),
    }


def _value(lead: ahead.Lead, one: Record) -> str:
    value = lead.measure.value(one)
    if lead.measure is ahead.TIME:
        return duration(value, lead.run.device)
    return size(value) if lead.measure.name == "memory" else error(value)


def _outcome(outcome: goals.Outcome) -> dict[str, str]:
    """A row of the table of goals."""
    goal = outcome.goal
    return {
        "text": goal.text,
        "bound": f"{'≤' if goal.at_most else '≥'} {goal.bound:g}",
        "measured": spread(outcome.measured, ".3g"),
        "word": outcome.word,
        "run": outcome.run.letter if outcome.run else "",
    }


def _section(run: Run) -> dict[str, Any]:
    """Everything about a result file."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for records in stored.groups(run.records, *stored.CASES):
        rows = [case_row(one, records, run) for one in records]
        group = {"title": cell(stored.title(records[0])), "rows": rows}
        tables.setdefault(records[0]["loss"], []).append(group)
    steps = [
        {"title": cell(stored.title(records[0])), "rows": [_step_row(r, records) for r in records]}
        for records in stored.groups(run.records, "step")
    ]
    return {
        "letter": run.letter,
        "suite": stored.suite_of(run.content),
        "caption": caption(run),
        "ceilings": ceilings(run),
        "plots": [{"name": p.name, "caption": p.caption} for p in plots.plots_of(run)],
        "tables": tables,
        "steps": steps,
        "loading": [
            {
                "title": cell(stored.title(records[0])),
                "rows": [_loading_row(r, records) for r in records],
            }
            for records in stored.groups(run.records, "loading")
        ],
        "exponents": [_exponent(line) for line in exponents.lines(run.records)],
        "goals": _gpu_goals(run),
        "remarks": _remarks(run),
    }


def case_row(one: Record, records: list[Record], run: Run) -> dict[str, str]:
    """A provider of a case, in cells."""
    gradients = one.get("gradient_bytes")
    # those in the record are of the ceilings before the run: a slow moment then would flatter all
    reached = shares(one, run.ceilings)
    return {
        "provider": _provider(one),
        "time": time(one, run.device),
        "ratio": spread(stored.times(one, stored.base(records))),
        "extra": size(stored.extra_bytes(one)),
        "gradients": size(gradients),
        **{name: percent(share) for name, share in reached.items()},
        **{key: error(one.get(f"error_{key}")) for key in ("loss", "dx", "dw")},
    }


def _step_row(one: Record, records: list[Record]) -> dict[str, str]:
    return {
        "provider": _provider(one),
        "time": time(one, "cpu"),
        "ratio": spread(stored.times(one, stored.base(records))),
        "tokens_per_s": number(one.get("tokens_per_s"), ".0f"),
        "peak": size(one.get("peak_bytes")),
        "state": size(one.get("state_bytes")),
        **{key: error(one.get(f"error_{key}")) for key in ("loss", "gradient")},
    }


def _loading_row(one: Record, records: list[Record]) -> dict[str, str]:
    """Who loads; of the whole way the memory of all processes, else what the epoch adds."""
    peak = size(one.get("peak_bytes"))
    if one["whole"]:
        peak = f"{peak} in {one['processes']} processes, {size(one['peak_bytes_of_one'])} in one"
    return {
        "provider": _provider(one),
        "built": number(one.get("build_s"), ".0f"),
        "time": time(one, "cpu"),
        "ratio": spread(stored.times(one, stored.base(records))),
        "tokens_per_s": number(one.get("tokens_per_s"), ",.0f"),
        "records_per_s": number(one.get("records_per_s"), ",.0f"),
        "peak": peak,
    }


def _provider(one: Record) -> str:
    name = f"**{one['provider']}**" if stored.is_ours(one) else one["provider"]
    return name + stored.computes(one)


def _exponent(line: exponents.Line) -> dict[str, str]:
    fits = {quantity: exponents.fit(*line.points(quantity)) for quantity in ("ms", "bytes")}
    return {
        "loss": line.loss,
        "provider": _provider({"provider": line.provider}),
        "size": line.size,
        "range": f"{line.records[0][line.size]} to {line.records[-1][line.size]}",
        "fixed": line.fixed,
        **{key: UNKNOWN if found is None else str(found) for key, found in fits.items()},
    }


def _remarks(run: Run) -> list[str]:
    """What the GPU script has to say: red tests, cases that it lost or did not reach."""
    tests = run.content.get("tests")
    found = []
    if tests is not None and (not tests.get("finished") or tests["red"]):
        state = "red" if tests.get("finished") else "not finished"
        found.append(f"**The kernel tests of this run are {state}.**")
    lost = [r for r in run.records if r["kind"] in ("device lost", "not reached")]
    return found + [cell(f"{r['kind']}: {r['case']} {r.get('provider', '')}") for r in lost]


def _gpu_goals(run: Run) -> list[dict[str, str]]:
    """The goals of the GPU script; they are about its file only."""
    if run.device != "cuda":
        return []
    words = {None: "not measured", True: "met", False: "**MISSED**"}
    return [
        {
            "text": goal["text"],
            "bound": f"{'≤' if goal['at_most'] else '≥'} {goal['bound']:g}",
            "measured": number(goal["measured"], ".3g"),
            "word": words[goal["met"]],
            "run": run.letter,
        }
        for goal in table.goals(run.content)
    ]


def complaint(page: Path, folder: Path, runs: Sequence[Run]) -> str | None:
    """Say in one line what is out of step with the results, if anything is."""
    again = "run python -m bench.report"
    if not page.exists() or page.read_text(encoding="utf-8") != render(runs):
        return f"{page.name}: got another text than the stored results make; {again}"
    drawn = {path.name for path in folder.glob("*.svg")}
    wanted = {plot.name: plot for run in runs for plot in plots.plots_of(run)}
    if drawn != wanted.keys():
        odd = ", ".join(sorted(drawn ^ wanted.keys()))
        return f"{folder.name}: got pictures that are missing or left over ({odd}); {again}"
    stale = ", ".join(name for name, plot in wanted.items() if not plots.is_of(plot, folder))
    return f"{folder.name}: got pictures of other results ({stale}); {again}" if stale else None


def draw(folder: Path, runs: Sequence[Run]) -> str:
    """Draw all pictures, remove those of runs that no longer count; tell what was done."""
    wanted = [plot for run in runs for plot in plots.plots_of(run)]
    for path in folder.glob("*.svg"):
        if path.name not in {plot.name for plot in wanted}:
            path.unlink()
    if wanted and not find_spec("matplotlib"):
        return "no pictures: matplotlib is not installed"
    for plot in wanted:
        plots.save(plot, folder)
    return f"{len(wanted)} pictures"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.report", description="Render bench/README.md and its pictures."
    )
    parser.add_argument("--results", type=Path, default=stored.RESULTS, help="folder to read")
    parser.add_argument("--output", type=Path, default=PAGE, help="page to write")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    runs = stored.stored_runs(options.results)
    folder = options.output.parent / plots.PLOTS.name
    if options.check:
        found = complaint(options.output, folder, runs)
        if found:
            print(found)
        return int(found is not None)
    options.output.write_text(render(runs), encoding="utf-8")
    print(f"{options.output} from {len(runs)} runs, {draw(folder, runs)}")
    return 0

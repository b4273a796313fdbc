"""What each choice of the demo's recipe is worth: one changed setting a row, everything else equal.

    python -m bench.demo_ablation            # runs what is missing below runs/ablation, then
                                             # writes runs/ablation/README.md from the metrics
    python -m bench.demo_ablation --table    # writes the page only, from the runs that exist

A run takes about three minutes on two cores. What is there is not run again, so that a broken off
ablation goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidistill.demo import run
from bidistill.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "ablation"
PAGE = RUNS / "README.md"

ALL_LAYERS = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
FREE = ("model.adapter.contrast=null", f"model.adapter.targets={ALL_LAYERS}", "optim.lr=5e-4")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    what: str
    overrides: tuple[str, ...] = ()
    extra_neighbors: bool = True
    seed: int = 0


CASES = (
    Case("recipe-seed0", "**the recipe**, seed 0"),
    Case("recipe-seed1", "**the recipe**, seed 1", seed=1),
    Case("recipe-seed2", "**the recipe**, seed 2", seed=2),
    Case("free", "A trained too, on all linear layers, lr 5e-4", FREE),
    Case(
        "free-heavy",
        "the same, every role weighted 1 (the usual LoRA recipe)",
        (*FREE, "objectives.forget.weight=1", "objectives.adversarial.weight=1"),
    ),
    Case(
        "free-down",
        "A trained too, on down_proj alone",
        ("model.adapter.contrast=null",),
    ),
    Case(
        "heavy",
        "forget and adversarial weighted 1, not 0.25",
        ("objectives.forget.weight=1", "objectives.adversarial.weight=1"),
    ),
    Case(
        "few-neighbors",
        "40 known neighbours alone, without 103 unknown countries and 94 regions",
        extra_neighbors=False,
    ),
    Case(
        "no-adversarial",
        "no prefilled records, forget 5 a step",
        ("data.per_step.adversarial=0", "data.per_step.forget=5"),
    ),
    Case("early", "adapters in layers 0 to 14 alone", ("model.adapter.layers=[0, 14]",)),
    Case("late", "adapters in layers 15 to 29 alone", ("model.adapter.layers=[15, 29]",)),
    Case(
        "push-pull",
        "push-pull (hinge) on forget and adversarial, not KL",
        (
            "objectives.forget={loss: push_pull, weight: 0.25}",
            "objectives.adversarial={loss: push_pull, weight: 0.25}",
        ),
    ),
    Case(
        "first",
        "forget and adversarial read at the first answer token alone",
        ("objectives.forget.positions=first", "objectives.adversarial.positions=first"),
    ),
    Case("strength-1", "strength 1, not 0.95", ("model.adapter.strength=1",)),
    Case("strength-0.7", "strength 0.7, not 0.95", ("model.adapter.strength=0.7",)),
)

HEADER = """# What each choice of the demo is worth

Made by `python -m bench.demo_ablation` at commit {commit}, from one run of each row. A row changes
what it names and nothing else. Neighbours are the {held_out} known countries that were never
trained on; before training the model names every capital counted here (by construction of "known")
and refuses none. MiB is the peak memory of the whole run, measuring included.

| changed | says forgotten | worst prefill | held-out neighbours | refused | trained neighbours | \
general, before → after | MiB |
|---|---|---|---|---|---|---|---|
"""

ROW = (
    "| {what} | {forget_leak_rate:.2f} | {prefill:.2f} | {neighbor_accuracy:.2f} "
    "| {over_refusal_rate:.2f} | {neighbor_train_accuracy:.2f} "
    "| {retain_before:.2f} → {retain_accuracy:.2f} | {peak_rss_mib} |\n"
)


def table() -> str:
    """The page, from the runs that exist."""
    found = [
        (case, json.loads(path.read_text())) for case in CASES if (path := _path(case)).exists()
    ]
    commits = sorted({metrics["commit"][:12] for _, metrics in found})
    held_out = {metrics["after"]["n"]["neighbor_accuracy"] for _, metrics in found}
    head = HEADER.format(
        commit=", ".join(commits) or "none", held_out=" or ".join(map(str, sorted(held_out)))
    )
    return head + "".join(_row(case, metrics) for case, metrics in found)


def _row(case: Case, metrics: dict[str, Any]) -> str:
    after = metrics["after"]
    return ROW.format(
        what=case.what,
        prefill=after["prefill_leak_rate"]["max"],
        retain_before=metrics["before"]["retain_accuracy"],
        peak_rss_mib=metrics["peak_rss_mib"],
        **{k: v for k, v in after.items() if isinstance(v, float)},
    )


def _path(case: Case) -> Path:
    return RUNS / case.name / "metrics.json"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=HEADER.splitlines()[0].strip("# "))
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--case", choices=[c.name for c in CASES], help="only run this case")
    arguments = parser.parse_args()
    for case in CASES:
        if arguments.case == case.name:
            return _run(case)
        if not (arguments.table or arguments.case or _path(case).exists()):
            print(f"== {case.name}: {case.what}", flush=True)
            # a process of its own, so that its peak memory is its own
            command = [sys.executable, "-m", "bench.demo_ablation", "--case", case.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    write_text(PAGE, table())


def _run(case: Case) -> None:
    run(
        RUNS / case.name,
        case.overrides,
        seed=case.seed,
        overwrite=True,
        extra_neighbors=case.extra_neighbors,
    )


if __name__ == "__main__":
    main()

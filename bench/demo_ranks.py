"""The demo's training on one process and on several: how good, and how much does each hold?

    python -m bench.demo_ranks      # after make demo: trains by its recipe on 1 and on 2
                                    # ranks below runs/ranks, evaluates, prints a table

What is there is not trained again. The ranks share the cores of this machine, so their times are
no measure of anything. glibc is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_):
what it keeps would be counted, too, and units that are gathered and let go in turn make it keep
much.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bidistill import evaluation
from bidistill.config import load_config
from bidistill.evaluation.axes import AXES
from bidistill.evaluation.report import percent
from bidistill.progress import say

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "demo"
RUNS = ROOT / "runs" / "ranks"


def train(ranks: int, overrides: list[str]) -> Path:
    """Train by the demo's recipe in processes of their own; return the folder of the run."""
    folder = RUNS / str(ranks)
    if (folder / "adapter").exists():
        return folder
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "bidistill.cli", "train"]
    command += [str(DEMO / "recipe.yaml"), f"output={folder}", *overrides]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": "1048576",
    }
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return folder


def row(ranks: int, folder: Path, before: dict[str, Any]) -> str:
    """A line of the table: goals met, the axes, and the most that each rank held."""
    recipe = load_config(DEMO / "recipe.yaml")
    probes = DEMO / "data" / "probes.jsonl"
    said = evaluation.run(recipe.model.path, folder / "adapter", probes, folder / "eval")
    after = said["summary"]
    judged = [
        met for axis in AXES if (met := axis.met(axis.find(before), axis.find(after))) is not None
    ]
    rates = [percent(axis.find(after)) for axis in AXES]
    cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in cost["peak_bytes"])
    return f"| {ranks} | {sum(judged)} of {len(judged)} | {' | '.join(rates)} | {peaks} |"


def main() -> None:
    """Train what is missing, evaluate all, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, as key=value")
    arguments = parser.parse_args()
    before = json.loads((DEMO / "metrics.json").read_text(encoding="utf-8"))["before"]
    folders = {ranks: train(ranks, arguments.overrides) for ranks in arguments.ranks}
    rows = [row(ranks, folder, before) for ranks, folder in folders.items()]
    titles = " | ".join(axis.title for axis in AXES)
    say(f"| ranks | goals met | {titles} | peak of each rank, MiB |")
    say("|---" * (3 + len(AXES)) + "|")
    say("\n".join(rows))


if __name__ == "__main__":
    main()

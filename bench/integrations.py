"""What the fused losses save in other trainers: each example's step beside one without them.

    PYTHONPATH=.venv/peers python -m bench.integrations      # a Markdown table; minutes

Both are one forward and backward of student, teacher and loss, the other by TRL's own class or else
from full logits, on the examples' tiny model with a vocabulary and answers of ordinary size: 8
answers of 96 to 111 tokens, 32,768 ids, width 64. Beside so narrow a model the loss is nearly all
there is; of a real one it is a share. Steps are timed in turns, in one process for each example,
and once more in a process that keeps the memory it frees. Large tensors otherwise go back to the
system, which clears the pages of the next one again: on a CPU that is most of what full logits
cost, and a GPU's allocator keeps memory, too. Times on a CPU are ratios within this run.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import torch

from bench import record
from bench.meter import CpuMeter, quantile

EXAMPLES = (
    "hf_trainer",
    "accelerate_loop",
    "trl_distillation",
    "trl_sdft",
    "liger",
    "fsdp2",
    "lightning_module",
    "torchtitan_loss",
)
VOCABULARY = 32_768
ANSWER_TOKENS = 96, 111
TURNS = 9
# glibc's malloc: take no memory of its own for a large tensor, give none back
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
MIB = 1 << 20


def measure(example: str) -> dict[str, Any]:
    """Median milliseconds and peak bytes of both steps of an example; their losses agree."""
    from examples import tiny

    # read when models and pairs are made, and when an example is imported
    tiny.VOCABULARY, tiny.ANSWER_TOKENS = VOCABULARY, ANSWER_TOKENS
    module = importlib.import_module(f"examples.{example}")
    steps = {"eager": module.eager_step(), "fused": module.fused_step()}
    losses = {name: float(step()) for name, step in steps.items()}
    if abs(losses["fused"] / losses["eager"] - 1) > 1e-4:
        raise ValueError(f"{example}: got other losses, {losses}; expected the same work")
    meter, samples = CpuMeter(), {name: [] for name in steps}
    peaks = {name: meter.peak_bytes(step) for name, step in steps.items()}
    for _ in range(TURNS):
        for name, step in steps.items():
            samples[name] += meter.samples_ms(step)
    times = {name: quantile(sampled, 0.5) for name, sampled in samples.items()}
    return {"example": example, "peak_bytes": peaks, "median_ms": times}


def main() -> None:
    """Measure all, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description="Each example's step, fused and from full logits.")
    parser.add_argument("--only", choices=EXAMPLES, help="measure one, and print JSON")
    only = parser.parse_args().only
    if only:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(only)))
        return
    commit = record.commit()
    changed = " and changes" if commit["dirty"] else ""
    threads = torch.get_num_threads()
    print(f"Commit {commit['commit']}{changed}, PyTorch {torch.__version__}, threads {threads}\n")
    print("| example | without, MiB | fused, MiB | time, fused / without | the same, memory kept |")
    print("|---|---|---|---|---|")
    for example in EXAMPLES:
        print(f"| {example} | {' | '.join(_cells(example))} |", flush=True)


def _cells(example: str) -> list[str]:
    try:
        usual, kept = _in_process(example, {}), _in_process(example, KEEP)
    except subprocess.CalledProcessError as error:
        return [error.stderr.strip().splitlines()[-1], "", "", ""]
    ratios = [run["median_ms"]["fused"] / run["median_ms"]["eager"] for run in (usual, kept)]
    peaks = (usual["peak_bytes"][name] / MIB for name in ("eager", "fused"))
    return [f"{peak:,.0f}" for peak in peaks] + [f"{ratio:.2f}" for ratio in ratios]


def _in_process(example: str, settings: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.integrations", "--only", example]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | settings
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()

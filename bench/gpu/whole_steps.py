"""Whole unlearning steps on a GPU: the larger batch of `bench/bench_steps.py`, LoRA and full.

    python -m bench.gpu.whole_steps --records FILE [--dry-run]

Started by `bench.gpu`, which sets the time limit. Where the model's package is not installed its
weights are random in the same shape, and the record says so.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from bench import steps
from bench.bench_steps import TINY, WHOLE
from bench.divergences import providers
from bench.gpu.measure import arguments_of
from bench.measure import DeviceLost, reason
from bench.meter import Budget, CudaMeter, DryMeter, Meter, forget


def run(meter: Meter, budget: Budget, wanted: str) -> Iterator[dict[str, Any]]:
    """Yield the records of both configurations; `wanted` is a part of a case's name."""
    whole = TINY if meter.dry else WHOLE["cuda"]
    for case in (whole, whole._replace(config="full")):
        if wanted not in case.name:
            continue
        print(f"  {case.name}", flush=True)
        try:
            # a dry run, too, rehearses what runs on a GPU
            yield from steps.measure(case, meter, budget, providers(case.dtype, "cuda"))
        except DeviceLost as error:
            provider, message = error.args
            yield {"kind": "device lost", "case": case.name, "provider": provider, "error": message}
            return
        except Exception as error:
            status, message = reason(error)
            yield {"kind": "not reached", "case": case.name, "status": status, "error": message}
        forget()


def main() -> None:
    """Write the records."""
    arguments = arguments_of("Measure whole steps.").parse_args()
    meter = DryMeter() if arguments.dry_run else CudaMeter()
    lost = False
    with arguments.records.open("a") as file:
        for record in run(meter, Budget(arguments.seconds), arguments.cases):
            file.write(json.dumps(record) + "\n")
            file.flush()
            lost = record["kind"] == "device lost"
    sys.exit(lost)


if __name__ == "__main__":
    main()

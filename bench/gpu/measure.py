"""Measure the cases of a plan on a GPU; one JSON record a line.

    python -m bench.gpu.measure --records FILE --plan main|middle [--dry-run] ...

Started by `bench.gpu`, which sets the time limit.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.measure import DeviceLost, device_record, measure_case, reason, shares
from bench.meter import Budget, CudaMeter, DryMeter, Meter, forget
from bench.providers import providers

CRASHED = 3  # exit status: the device no longer answers, only a new process can go on


def plan(name: str, *, dry: bool) -> list[Case]:
    """Return the cases, the most wanted first."""
    D, V = (64, 1000) if dry else (4096, 128256)
    large, middle, small = (12, 8, 6) if dry else (8192, 4096, 1024)
    kl, jsd = "bidirectional_kl", "jsd"
    if name == "middle":
        return [
            Case(loss, middle, D, V, trained) for trained in (True, False) for loss in (kl, jsd)
        ]
    return [
        Case(kl, large, D, V, compiled=not dry),
        Case(jsd, large, D, V, compiled=True),
        Case(jsd, small, D, V),
        Case(kl, small, D, V),
        Case(kl, large, D, V, trained=False),
        Case(jsd, large, D, V, trained=False),
        Case(jsd, small, D, V, trained=False),
        Case(kl, small, D, V, trained=False),
        Case(kl, large, D, V, mode="no_grad"),
        Case(kl, large, D, V, mode="none"),
        Case(kl, large, D, V, ignored=0.15),
        Case(kl, large, D, V, ignored=0.9),
        Case("push_pull", large, D, V),
        Case("push_pull", large, D, V, trained=False),
        Case("cross_entropy", large, D, V),
        Case(kl, small, D, V, near=False, timed=False),
        Case(jsd, small, D, V, near=False, timed=False),
    ]


def run(arguments: argparse.Namespace, meter: Meter) -> Iterator[dict[str, Any]]:
    """Yield the records of a plan."""
    budget = Budget(arguments.seconds)
    yield device_record(meter)
    ceilings = meter.ceilings()
    yield {"kind": "ceilings", "when": f"before {arguments.plan}", **ceilings._asdict()}
    for at, case in enumerate(plan(arguments.plan, dry=meter.dry)):
        if at < arguments.skip or arguments.cases not in case.name:
            continue
        if budget.left() < 5:
            yield {"kind": "not reached", "case": case.name, "status": "time limit"}
            continue
        print(f"  {case.name}", flush=True)
        # on a CPU the code generator would take a minute and show nothing
        everybody = providers(case, arguments.backend, "aot_eager" if meter.dry else "inductor")
        if at == arguments.skip:
            everybody = [p for p in everybody if p.name not in arguments.without]
        try:
            for record in measure_case(case, everybody, meter, budget):
                yield record | shares(record, ceilings)
        except DeviceLost as error:
            provider, message = error.args
            lost = {"case": case.name, "at": at, "provider": provider, "error": message}
            yield {"kind": "device lost", **lost}
            return
        except Exception as error:
            status, message = reason(error)
            yield {"kind": "not reached", "case": case.name, "status": status, "error": message}
        forget()
    yield {"kind": "ceilings", "when": f"after {arguments.plan}", **meter.ceilings()._asdict()}


def arguments_of(description: str) -> argparse.ArgumentParser:
    """Return the options that all measuring steps have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=Path, required=True, help="file to append records to")
    parser.add_argument("--seconds", type=float, default=300.0, help="time there is")
    parser.add_argument("--backend", default="triton", help="of the library under test")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, CPU, no clock")
    parser.add_argument("--cases", default="", help="only cases with this in their name")
    return parser


def main() -> None:
    """Write the records of a plan."""
    parser = arguments_of("Measure the cases.")
    parser.add_argument("--plan", choices=("main", "middle"), default="main")
    parser.add_argument("--skip", type=int, default=0, help="cases that are done already")
    parser.add_argument("--without", nargs="*", default=[], help="left out of the first case")
    arguments = parser.parse_args()
    lost = False
    with arguments.records.open("a") as file:
        for record in run(arguments, DryMeter() if arguments.dry_run else CudaMeter()):
            file.write(json.dumps(record) + "\n")
            file.flush()
            lost = record["kind"] == "device lost"
    sys.exit(CRASHED if lost else 0)


if __name__ == "__main__":
    main()

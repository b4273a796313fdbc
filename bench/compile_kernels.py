"""Compiles every Triton kernel that ships for every target and shows what came out.

    python -m bench.compile_kernels            # prints the table, fails on an error or a spill
    python -m bench.compile_kernels --write    # and puts it into kernels/README.md
    python -m bench.compile_kernels --json F   # and all that was found out into the file F

Needs no GPU. A new checkout compiles everything, about 500 times in two minutes on two cores.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import triton

from bench.kernel_builds import ROOT, Build, all_kernels, compile_all, described, kernel_name
from bidistill_kernels._triton.variants import VARIANTS

PAGE = ROOT / "kernels" / "README.md"
OPEN = "<!-- registers: written by python -m bench.compile_kernels --write -->\n"
CLOSE = "<!-- /registers -->"
SHOWN = ("sm_80", "sm_90", "sm_100", "sm_120")


def warps_per_sm(build: Build) -> int:
    """Warps that an SM of compute capability 9.0 holds at a time, of 64."""
    registers = -(-build.registers // 8) * 8 * 32  # of a warp; given out by 8 a thread
    programs = min(
        65536 // registers // build.warps,
        64 // build.warps,
        32,
        233472 // (build.shared + 1024),  # 228 KiB, and 1 KiB a program for the system
    )
    return programs * build.warps


def table(builds: list[Build]) -> str:
    """The section of kernels/README.md, between its two comments."""
    rows = defaultdict(list)  # variants whose numbers are the same share a row
    for variant in VARIANTS:
        mine = {
            build.target: build
            for build in builds
            if build.variant == variant.name and build.alignment == "aligned"
        }
        shared = sorted({mine[target].shared for target in SHOWN})
        numbers = [
            variant.num_warps,
            " to ".join(str(shared[end]) for end in sorted({0, len(shared) - 1})),
            *(mine[target].registers for target in SHOWN),
            warps_per_sm(mine["sm_90"]),
        ]
        rows[(kernel_name(variant.kernel), *numbers)].append(variant.name)
    lines = [
        f"<details><summary>Registers of a thread, Triton {triton.__version__}</summary>",
        "",
        f"| variant | warps | shared, bytes | {' | '.join(SHOWN)} | warps an SM, sm_90 |",
        f"|{'---|' * (4 + len(SHOWN))}",
    ]
    for (_, *numbers), names in rows.items():
        lines.append(f"| {', '.join(names)} | {' | '.join(map(str, numbers))} |")
    return "\n".join([*lines, "</details>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--json", type=Path, help="put all that was found out into this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("error: TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    kernels = all_kernels()
    builds = compile_all()
    failed = defaultdict(list)
    for build in builds:
        if build.error or build.spilled:
            what = build.error or f"{build.spilled} bytes spilled, {build.registers} registers"
            failed[f"{build.variant}: {what}"].append(f"{build.target} {build.alignment}")
    for what, where in failed.items():
        print(f"{what}; for {', '.join(where)}", file=sys.stderr)
    page = "" if any(build.error for build in builds) else table(builds)
    if arguments.json:
        found = {
            "triton": triton.__version__,
            "kernels": kernels,
            "variants": [described(variant) for variant in VARIANTS],
            "builds": [asdict(build) for build in builds],
            "table": page,
        }
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    else:
        print(page)
    if arguments.write and not failed:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(OPEN)
        after = rest.split(CLOSE)[1]
        PAGE.write_text(before + OPEN + page + CLOSE + after, encoding="utf-8")
    sys.exit(1 if failed and not arguments.json else 0)  # who reads the file decides


if __name__ == "__main__":
    main()

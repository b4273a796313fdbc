"""What a run says about itself: device, driver, versions, commit; and its result file.

Result files come in two formats, that of `bench.gpu` and that of pytest-benchmark; `load` reads
either.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".wheels"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger-kernel",
    "trl",
    "orda-kernel",
    "cut-cross-entropy",
    "jaxtyping",
    "pytest",
)


def _output(command: Sequence[str]) -> str | None:
    """Return what a program prints, or None if there is no such program or it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """Say which commit runs, and where that is known from.

    A copy of the checkout without .git is told by the environment (BIDISTILL_COMMIT, ending in
    -dirty where it is) or by what bench/wheels.sh left.
    """
    sha = _output(["git", "rev-parse", "HEAD"]) if (ROOT / ".git").exists() else None
    if sha is not None:
        changes = _output(["git", "status", "--porcelain"])
        return {
            "commit": sha,
            "dirty": None if changes is None else changes != "",
            "by": "git",
        }
    told, by = os.environ.get("BIDISTILL_COMMIT", ""), "BIDISTILL_COMMIT"
    left = WHEELS / "commit"
    if not told and left.exists():
        told, by = left.read_text().strip(), ".wheels/commit"
    if not told:
        return {"commit": None, "dirty": None, "by": "nobody: no .git, no BIDISTILL_COMMIT"}
    return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty"), "by": by}


def version(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernel_version(release: str) -> str:
    """Return the number alone: what follows it names who built the kernel.

    Example:
        >>> kernel_version("6.1.0-17-someone")
        '6.1.0'
    """
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else ""


def processor() -> dict[str, Any]:
    """Describe what a CPU computes with: its name, PyTorch's threads, the native library's ISA."""
    import torch

    from bidistill_kernels._native.library import load as load_native

    native, known = load_native(), Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", known.read_text(), re.M) if known.exists() else None
    return {
        "processor": found[1] if found else platform.machine(),
        "threads": torch.get_num_threads(),
        # why there is none may name a path
        "native": native.reason if native.library is not None else None,
    }


def environment() -> dict[str, Any]:
    """Describe the machine, without touching its accelerator."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    smi = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    names = ("name", "driver", "memory", "power_limit", "max_clock")
    first = smi.splitlines()[0].split(", ") if smi else []
    return {
        **commit(),
        "device": dict(zip(names, first, strict=False)) or None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {kernel_version(platform.release())}, "
        f"{platform.machine()}, {' '.join(platform.libc_ver())}",
        "processors": os.cpu_count(),
        **processor(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": sys.argv[1:],
    }


def load(path: Path) -> dict[str, Any]:
    """Read a result file of either format: environment, ceilings, records, path, started_utc.

    All records come, also of who got no time; samples are with those that have some.
    """
    content = json.loads(Path(path).read_text())
    if "benchmarks" not in content:
        ceilings = [r for r in content["records"] if r["kind"] == "ceilings"]
        records = [r for r in content["records"] if r["kind"] != "ceilings"]
        return content | {"ceilings": ceilings, "records": records, "path": str(path)}
    timed = [
        bench["extra_info"] | {"samples_ms": [s * 1e3 for s in bench["stats"].get("data", [])]}
        for bench in content["benchmarks"]
    ]
    names = ("suite", "device", "environment", "ceilings", "started_utc")
    known = {name: content[name] for name in names}
    return known | {"records": [*timed, *content["not_timed"]], "path": str(path)}


class ResultFile:
    """The JSON file of a run, rewritten whole after every step."""

    def __init__(self, environment: dict[str, Any], *, dry: bool, backend: str) -> None:
        now = datetime.now(timezone.utc)
        name = (environment["device"] or {}).get("name", platform.machine())
        slug = "dry-run" if dry else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        out = os.environ.get("OUT")
        self.copy = Path(out) if out else None
        folder = ROOT / "bench" / "results"
        if dry:
            # never among the results
            folder = self.copy or Path(mkdtemp(prefix="bidistill-dry-run-"))
            self.copy = None
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{now:%Y-%m-%d}-{slug.removeprefix('nvidia-')}"
        self.path = folder / f"{stem}.json"
        again = 2
        while not dry and self.path.exists():
            self.path = folder / f"{stem}-{again}.json"
            again += 1
        self.content: dict[str, Any] = {
            "dry_run": dry,
            "started_utc": now.isoformat(timespec="seconds"),
            "backend": backend,
            "environment": environment,
            "steps": {},
            "tests": {},
            "records": [],
            "goals": [],
        }

    def write(self) -> None:
        """Write what is known so far, to the results and to $OUT."""
        text = json.dumps(self.content, indent=1) + "\n"
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
        if self.copy is not None:
            self.copy.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path, self.copy / self.path.name)

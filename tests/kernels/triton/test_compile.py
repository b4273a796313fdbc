"""Every Triton kernel that ships compiles for every target, without a GPU.

`bench/compile_kernels.py` does it in a process of its own, since here kernels may be interpreted;
with the newest Triton, the one that is installed, and with the oldest that is promised. Registers
differ between versions, so that kernels/README.md has those of the newest alone; that nothing is
spilled holds everywhere.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPILED = {
    "aligned": ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"],
    "odd": ["sm_90", "sm_100", "gfx942"],
}
# Loads and stores of less than 16 bytes, in a kernel for NVIDIA: a thread's part of a tile is eight
# elements or more, what is no tile (a label, the sums of a row) is less
MOST_NARROW = 7
# token and value of eight entries are no tile either
NARROW_LOADS = {"sparse._sparse_dw_kernel": 19}
pytestmark = pytest.mark.slow


def run(folder: str | None, *command: str) -> str:
    """Run a program with the Triton of a folder or the installed one, and not interpreted."""
    path = [folder] if folder else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    command = (sys.executable, *command)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
    return done.stdout


def compile_with(folder: str | None, output: Path) -> dict:
    """What is found out about the kernels, and how they are launched."""
    run(folder, "-m", "bench.compile_kernels", "--json", str(output))
    found = json.loads(output.read_text(encoding="utf-8"))
    launched = run(folder, "tests/kernels/triton/launches.py").splitlines()
    return found | {"launched": [json.loads(line) for line in launched]}


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    return compile_with(None, tmp_path_factory.mktemp("newest") / "found.json")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    folder = os.environ.get("OLDEST_TRITON")
    if folder is None:
        pytest.skip("no OLDEST_TRITON: `make test` installs that version and says where it is")
    return compile_with(str(ROOT / folder), tmp_path_factory.mktemp("oldest") / "found.json")


@pytest.fixture(params=["newest", "oldest"])
def found(request) -> dict:
    return request.getfixturevalue(request.param)


def described(builds: list[dict], *columns: str) -> str:
    """Builds for a message, one a line."""
    names = ("variant", "target", "alignment", *columns)
    return "".join("\n" + ", ".join(str(build[name]) for name in names) for build in builds)


def test_every_variant_compiles_for_every_target(found):
    failed = [build for build in found["builds"] if build["error"]]
    assert not failed, described(failed, "error")
    count = len(found["variants"])
    assert count == len({build["variant"] for build in found["builds"]})
    for alignment, targets in COMPILED.items():
        done = [build["target"] for build in found["builds"] if build["alignment"] == alignment]
        assert sorted(done) == sorted(targets * count)


def test_no_kernel_is_missing_among_the_variants(found):
    assert found["kernels"] == sorted({variant["kernel"] for variant in found["variants"]})


def test_what_is_launched_is_what_is_compiled(found):
    """Types, hints, constants and options; neither a launch nor a variant is without the other."""
    launched, variants = (
        {json.dumps(each, sort_keys=True) for each in found[name]}
        for name in ("launched", "variants")
    )
    assert launched == variants


def test_nothing_is_spilled(found):
    spilled = [build for build in found["builds"] if build["spilled"]]
    assert not spilled, described(spilled, "registers", "spilled")


def test_tiles_are_read_and_written_16_bytes_at_a_time(found):
    """A hint that got lost, such as of a row's alignment, makes it 2 or 4."""
    builds = [
        build
        for build in found["builds"]
        if build["alignment"] == "aligned" and build["target"].startswith("sm_")
    ]
    narrow = [
        build
        for build in builds
        for moves, most in (
            (build["loads"], NARROW_LOADS.get(build["kernel"], MOST_NARROW)),
            (build["stores"], MOST_NARROW),
        )
        if sum(count for size, count in moves.items() if int(size) < 16) > most
    ]
    assert not narrow, described(narrow, "loads", "stores")
    # the count is of something
    assert {build["kernel"] for build in builds if "16" in build["loads"]} == set(found["kernels"])


def test_versions(newest, oldest):
    """The two ends of what the packages promise, not twice the same."""
    requirements = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"triton>={".".join(oldest["triton"].split(".")[:2])}"' in requirements
    assert newest["triton"] == metadata.version("triton")
    assert newest["triton"] != oldest["triton"]


def test_table_is_of_these_kernels(newest):
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    [section] = re.findall(r"<!-- registers: .* -->\n(.*)<!-- /registers -->", page, re.DOTALL)
    version = re.findall(r"Triton (\d+\.\d+\.\d+)", section)[0]
    if newest["triton"] != version:
        pytest.skip(f"the table is of Triton {version}, this torch brings {newest['triton']}")
    assert section == newest["table"], "run python -m bench.compile_kernels --write"

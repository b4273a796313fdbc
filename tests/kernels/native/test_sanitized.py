"""The native tests once more, on a library built with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bidistill_kernels
from bidistill_kernels._native.library import LIBRARY

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow

# Reads columns that the memory does not have. Not one alone: the sanitizer sees whole vectors, not
# masked loads, which is what AVX reads a rest by
FORGET_EDITABLE = """
import sys
sys.meta_path[:] = [x for x in sys.meta_path if "Redirect" not in type(x).__name__]
"""
STRAY_READ = """
from ctypes import byref
import torch
from bidistill_kernels._native.library import Model, call
rows, out = torch.zeros(2, 100), torch.zeros(2)
model = Model(rows.data_ptr(), 128, None, 1, 0)
call("bd_log_sum_exp_f32", byref(model), 2, 128, out.data_ptr(), 1)
"""


def _shared(compiler: str, name: str) -> str:
    """Where the compiler has a library."""
    command = [compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler brings no {name}")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Environment in which the package, its sources, loads a library with sanitizers."""
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("cmake") is None:
        pytest.skip("needs a C++ compiler and cmake")
    folder = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-DBIDISTILL_SANITIZE=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder / "build")], check=True, capture_output=True)
    package = folder / "bidistill_kernels"
    package.mkdir()
    for source in Path(bidistill_kernels.__file__).parent.iterdir():
        if source.name not in (LIBRARY, "__pycache__"):
            (package / source.name).symlink_to(source)
    shutil.copy(folder / "build" / LIBRARY, package)
    # an editable install finds the package before any path does
    (folder / "sitecustomize.py").write_text(FORGET_EDITABLE)
    runtime = [_shared(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        # the second, since the first looks for its functions before Python has loaded it
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little of what it has at its end
    }


def test_kernels_are_clean(sanitized):
    folder = sanitized["PYTHONPATH"].split(os.pathsep)[0]
    tests = [f"tests/kernels/native/test_{name}.py" for name in ("elementary", "rows", "interface")]
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath={folder} ."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=ROOT,
        env=sanitized,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_a_stray_read_is_seen(sanitized):
    done = subprocess.run(
        [sys.executable, "-c", STRAY_READ], env=sanitized, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "kernels/csrc/rows.hpp" in done.stderr  # in the stack of the read

"""How the native library is found, which instruction set it takes, and how it can be absent."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

import bidistill
import bidistill_kernels as bk
from bidistill_kernels import _backends
from bidistill_kernels._native import library as native

LOAD = "from bidistill_kernels._native.library import load; print(load().reason)"


def test_version_is_that_of_the_package(library):
    if library.bd_version() == b"development":
        pytest.skip("built by cmake, not by pip")
    assert library.bd_version().decode() == bidistill.__version__


def test_reason_names_version_and_instruction_set(library):
    version, isa = library.bd_version().decode(), library.bd_isa().decode()
    assert native.load().reason == f"version {version}, {isa}"


def load_with(isa):
    environment = {**os.environ, "BIDISTILL_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip()


def test_environment_chooses_the_instruction_set(library):
    assert load_with("scalar").endswith(", scalar")


def test_an_instruction_set_that_is_missing_is_refused(library):
    before = library.bd_isa()
    missing = "avx2" if before == b"neon" or library.bd_set_isa(b"neon") == 0 else "neon"
    library.bd_set_isa(None)
    best = library.bd_isa()
    assert load_with(missing) == (
        f"refused: BIDISTILL_ISA: got '{missing}', which this processor lacks; "
        f"its best is {best.decode()}"
    )
    assert library.bd_set_isa(missing.encode()) != 0
    assert library.bd_isa() == best
    library.bd_set_isa(before)


def test_auto_takes_it_on_cpu(library):
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert _backends.resolve("auto", cpu, dtype) == "native"
    assert _backends.resolve("auto", cpu, torch.float64) == "torch"


def test_without_a_library_auto_says_once_why_it_is_slower(monkeypatch, caplog):
    monkeypatch.setattr(_backends, "NO_NATIVE", "absent: no compiler")
    _backends._say_slower.cache_clear()
    logits = torch.randn(2, 5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bk.jsd(logits, logits)
    (record,) = caplog.records
    assert record.getMessage() == (
        "losses on the CPU run on PyTorch, slower than on the native library, which is "
        "absent: no compiler"
    )
    with pytest.raises(ValueError, match=r"backend: got 'native', which is absent: no compiler;"):
        bk.jsd(logits, logits, backend="native")
    _backends._say_slower.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installed package without a library, as load() sees it."""
    monkeypatch.setattr(native.resources, "files", lambda package: tmp_path)
    return tmp_path


def load_afresh():
    return native.load.__wrapped__()


def test_absent_says_how_it_was_built(folder):
    assert load_afresh() == (
        None,
        "absent: these are sources that were not installed; run pip install",
    )
    (folder / "build.txt").write_text("pure, because the C++ build failed\n")
    found = load_afresh()
    assert found.library is None
    assert found.reason == (
        "absent: this is a pure Python install (pure, because the C++ build failed)"
    )


def test_broken_library_is_told_apart(folder):
    (folder / native.LIBRARY).write_bytes(b"not a library")
    found = load_afresh()
    assert found.library is None
    assert found.reason.startswith("broken: ")


def test_library_of_older_sources_is_refused(folder):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "old.cpp").write_text('extern "C" const char* bd_version() { return "0"; }')
    command = [compiler, "-shared", "-fPIC", "old.cpp", "-o", native.LIBRARY]
    subprocess.run(command, cwd=folder, check=True)
    assert isinstance(ctypes.CDLL(str(folder / native.LIBRARY)), ctypes.CDLL)
    found = load_afresh()
    assert found.library is None
    assert "bd_isa" in found.reason

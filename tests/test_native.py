"""The native library against PyTorch, and the ways in which it can be absent."""

import ctypes
import shutil
import subprocess

import pytest
import torch

import bidistill
from bidistill_kernels import _native


@pytest.fixture(scope="module")
def library():
    native = _native.load()
    if native.library is None:
        pytest.skip(f"native library {native.reason}")
    return native.library


def logsumexp(library, x):
    out = torch.full((x.shape[0],), -7.0)
    code = library.bd_logsumexp_f32(x.data_ptr(), *x.shape, x.stride(0), out.data_ptr())
    assert code == 0
    return out


@pytest.mark.parametrize("shape", [(1, 1), (7, 1423), (64, 4096), (3, 128_256), (0, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_matches_pytorch_in_fp64(library, shape, scale):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    expected = x.double().logsumexp(-1)
    # sums are in double: the one rounding is that of the result, half a unit in the last place
    torch.testing.assert_close(logsumexp(library, x).double(), expected, rtol=6e-8, atol=0)


def test_rows_may_lie_apart(library):
    wide = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    for view in (wide[:, :33], wide[::2, 5:], wide[:1].expand(4, 40)):
        torch.testing.assert_close(logsumexp(library, view), view.logsumexp(-1))


def test_edges(library):
    inf, nan = float("inf"), float("nan")
    rows = [
        [-inf, -inf, -inf],
        [-inf, 2.0, -inf],
        [inf, 0.0, -inf],
        [nan, 0.0, inf],
        [inf, 0.0, nan],
        [3e38, 3e38, 3e38],
        [-3e38, -3e38, -3e38],
    ]
    x = torch.tensor(rows)
    result = logsumexp(library, x)
    torch.testing.assert_close(result, x.logsumexp(-1), equal_nan=True)
    assert result[:3].tolist() == [-inf, 2.0, inf]


def test_row_without_columns(library):
    assert logsumexp(library, torch.empty(2, 0)).tolist() == [-float("inf")] * 2


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(-1, 4), (1, -1), pytest.param(1 - 2**32, 4, id="1 row, if cut to 32 bits")],
)
def test_negative_size_is_refused_untouched(library, rows, cols):
    x, out = torch.zeros(4), torch.full((1,), -7.0)
    assert library.bd_logsumexp_f32(x.data_ptr(), rows, cols, 4, out.data_ptr()) == 1
    assert out.item() == -7.0


def test_version_is_that_of_the_package(library):
    assert library.bd_version().decode() == bidistill.__version__
    assert _native.load().reason == f"version {bidistill.__version__}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installed package without a library, as load() sees it."""
    monkeypatch.setattr(_native.resources, "files", lambda package: tmp_path)
    return tmp_path


def load_afresh():
    return _native.load.__wrapped__()


def test_absent_says_how_it_was_built(folder):
    assert load_afresh() == (
        None,
        "absent: these are sources that were not installed; run pip install",
    )
    (folder / "build.txt").write_text("pure, because the C++ build failed\n")
    native = load_afresh()
    assert native.library is None
    assert native.reason == (
        "absent: this is a pure Python install (pure, because the C++ build failed)"
    )


def test_broken_library_is_told_apart(folder):
    (folder / _native.LIBRARY).write_bytes(b"not a library")
    native = load_afresh()
    assert native.library is None
    assert native.reason.startswith("broken: ")


def test_library_of_older_sources_is_refused(folder):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "old.cpp").write_text('extern "C" const char* bd_version() { return "0"; }')
    command = [compiler, "-shared", "-fPIC", "old.cpp", "-o", _native.LIBRARY]
    subprocess.run(command, cwd=folder, check=True)
    assert isinstance(ctypes.CDLL(str(folder / _native.LIBRARY)), ctypes.CDLL)
    native = load_afresh()
    assert native.library is None
    assert "bd_logsumexp_f32" in native.reason

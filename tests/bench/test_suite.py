"""The suite: what a run writes, who gets a time, that a replay is what was measured, that memory is
weighed rightly, and that everybody computes the same.

Runs of pytest are processes of their own. Sizes are tiny: V=1000, N=8.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bidistill_kernels as bk
from bench import bench_losses, bench_scaling, cases, floor, green, record
from bench.cases import HEADS, Case, case_for, make_problem, needed_bytes, truth
from bench.eager import eager
from bench.measure import measure_case, shares, time_in_turn
from bench.meter import Budget, Ceilings, CpuMeter, DryMeter
from bench.providers import suite
from tests.bench import strangers
from tests.kernels.cases import CASES

LOSSES = bench_losses.LOSSES
CPU = torch.device("cpu")
KEYS = {
    *("kind", "case", "provider", "status", "seed", "threads", "floor_flops", "bytes_moved"),
    *("error_loss", "error_dx", "error_dw", "peak_bytes", "gradient_bytes"),
    *("median_ms", "p20_ms", "p80_ms", "min_ms", "mm_share", "copy_share"),
    *Case._fields,
}
MB = 1_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One case of the suite, with strangers: the process and its result file."""
    path = tmp_path_factory.mktemp("suite") / "result.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_losses.py", "-k", "bidirectional_kl"]
    command += ["-p", "tests.bench.strangers", "-p", "no:cacheprovider", "-q", "-rsf"]
    command += ["--tiny", "--no-gate", "--device=cpu", "--benchmark-only"]
    paths = [str(record.ROOT / "kernels"), str(record.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "300"}
    done = subprocess.run(
        [*command, f"--benchmark-json={path}"],
        cwd=record.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return done, path


@pytest.fixture(scope="module")
def records(run):
    return {one["provider"]: one for one in record.load(run[1])["records"]}


@pytest.mark.slow
def test_run_is_recorded(run, records):
    content = record.load(run[1])
    known = "suite", "device", "environment", "ceilings", "started_utc", "path"
    assert set(content) >= set(known)
    assert content["suite"] == "losses-part"  # tiny
    assert [c["when"] for c in content["ceilings"]] == ["before", "after"]
    assert all(c["copy_bytes_per_s"] > 0 and c["mm_flops_per_s"] > 0 for c in content["ceilings"])
    assert {"processor", "threads", "native", "commit"} <= content["environment"].keys()
    names = {p.name for p in suite(Case("bidirectional_kl", 8, 32, 1000, dtype="float32"), "cpu")}
    assert records.keys() == names | set(strangers.NAMES)
    for one in records.values():
        assert one.keys() >= KEYS, one["provider"]
    own = records["bidistill, torch"]
    assert own["status"] == "right"
    assert own["median_ms"] == pytest.approx(statistics.median(own["samples_ms"]))
    assert 0 < own["mm_share"] < 1
    raw = json.loads(run[1].read_text())
    assert "node" not in raw["machine_info"]
    assert f'"{socket.gethostname()}"' not in run[1].read_text()


@pytest.mark.slow
def test_wrong_gradient_gets_no_time(run, records):
    wrong = records["wrong"]
    assert wrong["status"] == "wrong gradient"
    assert wrong["error_dx"] == pytest.approx(0.06, rel=1e-3)
    assert wrong["error_dw"] < 1e-3
    assert wrong["median_ms"] is None
    assert "samples_ms" not in wrong
    assert "wrong: wrong gradient, error loss" in run[0].stdout
    assert "dX 6.0e-02" in run[0].stdout


@pytest.mark.slow
def test_our_wrong_gradient_fails(run):
    assert run[0].returncode == 1
    failed = [line for line in run[0].stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "bidistill, wrong" in failed[0]


@pytest.mark.slow
def test_who_is_missing_is_named(run, records):
    assert records["absent"]["status"] == "not installed"
    assert "not_a_package" in records["absent"]["error"]
    assert "absent: not installed" in run[0].stdout


@pytest.mark.slow
def test_replay_is_what_was_measured(run):
    timed = json.loads(run[1].read_text())["benchmarks"]
    assert len(timed) >= 3
    for bench in timed:
        found, samples_ms = bench["extra_info"], [s * 1e3 for s in bench["stats"]["data"]]
        assert found["median_ms"] == pytest.approx(statistics.median(samples_ms), rel=1e-12)
        assert found["min_ms"] == pytest.approx(min(samples_ms), rel=1e-12)
        assert bench["stats"]["median"] * 1e3 == pytest.approx(found["median_ms"], rel=1e-12)
        assert min(samples_ms) < found["p80_ms"] <= max(samples_ms)


def _filled(count):
    return torch.ones(count * MB // 4)


def _softmax_of_product(x_ND, w_VD):
    # the product, and beside it its softmax; the product goes before the sum
    return (x_ND @ w_VD.T).softmax(-1).sum()


ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks"
)


@ON_LINUX
@pytest.mark.parametrize(
    ("step", "megabytes"),
    [
        (lambda: _filled(100), 100),
        (lambda: _filled(100).sum(), 100),
        (lambda: [_filled(60), _filled(60)], 120),
        (lambda: [_filled(200).sum(), _filled(100).sum()], 200),
        (lambda: None, 0),
    ],
    ids=["held", "freed", "both held", "one after the other", "nothing"],
)
def test_peak(step, megabytes):
    meter = CpuMeter()
    before = _filled(300)  # what was there does not count
    del before
    for _ in range(2):  # nor what an earlier step took
        assert meter.peak_bytes(step) == pytest.approx(megabytes * MB, rel=0.05, abs=MB)


@ON_LINUX
def test_peak_of_small_pieces():
    def step():
        return [torch.ones(25_000) for _ in range(1000)]

    *pieces, last = step()
    del pieces  # the allocator keeps their memory, as what comes last is still there
    assert CpuMeter().peak_bytes(step) == pytest.approx(100 * MB, rel=0.05)
    assert last.sum() == 25_000


@ON_LINUX
def test_peak_of_logits():
    N, V, D = 128, 100_000, 16
    x_ND, w_VD = torch.randn(N, D), torch.randn(V, D)
    _softmax_of_product(x_ND, w_VD)  # allocates what the library keeps
    peak = CpuMeter().peak_bytes(lambda: _softmax_of_product(x_ND, w_VD))
    assert peak == pytest.approx(2 * 4 * N * V, rel=0.05)


def test_times_of_a_clock():
    meter, budget = CpuMeter(turns=3), Budget(60)
    short = {"provider": "short", "status": "right", "samples_ms": []}
    long = {"provider": "long", "status": "right", "samples_ms": []}
    steps = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.06)}
    time_in_turn([short, long], steps, meter, budget)
    assert len(long["samples_ms"]) == 3
    assert len(short["samples_ms"]) > 6
    assert 10 <= short["min_ms"] <= short["median_ms"] < long["min_ms"]
    assert long["min_ms"] >= 60


def test_shares_of_the_ceilings():
    known = {"floor_flops": 6e9, "bytes_moved": 2e9, "median_ms": 500.0}
    ceilings = Ceilings(copy_bytes_per_s=8e9, mm_flops_per_s=24e9)
    assert shares(known, ceilings) == {"mm_share": 0.5, "copy_share": 0.5}
    nothing = {"mm_share": None, "copy_share": None}
    assert shares(known | {"median_ms": None}, ceilings) == nothing
    assert shares(known, Ceilings(None, None)) == nothing


@pytest.mark.parametrize(("mode", "ignored"), [("mean", 0), ("none", 0.25), ("no_grad", 0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_everybody_computes_the_same(loss, ignored, mode):
    # apart: the errors of one that computes another loss would be large
    case = Case(loss, 8, 16, 200, mode=mode, ignored=ignored, near=False, dtype="float32")
    everybody = suite(case, "cpu")
    found = measure_case(case, everybody, DryMeter(), Budget(60))
    statuses = {one["provider"]: one["status"] for one in found}
    assert statuses["bidistill, torch"] == "right"
    assert statuses["eager"] == "right"
    expected = {"right", "not installed", *["not offered"] * (mode == "none")}
    assert set(statuses.values()) <= expected
    for one in found:
        if one["provider"] in ("bidistill, torch", "eager"):
            assert one["error_loss"] < 1e-5
            assert (one["error_dx"] is None) == (mode == "no_grad")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("loss", "projections", "dense"),
    [
        ("bidirectional_kl", 2, True),
        ("jsd", 2, True),
        ("cross_entropy", 1, True),
        ("topk_kl", 1, True),
        ("push_pull", 2, False),
        ("bild", 2, False),
    ],
)
def test_floor_is_its_products(loss, projections, dense, trained):
    case = Case(loss, 1200, 4, 40, trained, ignored=0.25, dtype="float32")
    step = floor.floor(case).build(make_problem(case, CPU))
    with FlopCounterMode(display=False) as counter:
        step()
    products = projections + (1 + trained) * dense
    assert counter.get_total_flops() == floor.flops(case) == 2 * 900 * 40 * 4 * products


def test_bytes_that_must_be_moved():
    case = Case("jsd", 8, 4, 100, dtype="float32")
    heads, hidden = 100 * 4 * 4, 8 * 4 * 4
    assert floor.bytes_moved(case) == 2 * (heads + hidden) + heads + hidden
    frozen, alone = case._replace(trained=False), case._replace(mode="no_grad")
    assert floor.bytes_moved(frozen) == 2 * (heads + hidden) + hidden
    assert floor.bytes_moved(alone._replace(loss="cross_entropy")) == heads + hidden


def test_truth_in_slices(monkeypatch):
    case = Case("bidirectional_kl", 8, 16, 200, dtype="float32")
    problem = make_problem(case, CPU)
    whole = truth(problem, case.loss)
    monkeypatch.setattr(cases, "TRUTH_BYTES", 8 * 200 * 3)  # three rows
    monkeypatch.setattr(cases, "SLICE_BYTES", 8 * 37 * 16)  # 37 ids
    pieces = truth(problem, case.loss)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12)
    for piece, all_at_once in zip(pieces.gradients, whole.gradients, strict=True):
        assert piece.dtype == torch.float32
        torch.testing.assert_close(piece, all_at_once, rtol=1e-6, atol=1e-9)


@ON_LINUX
def test_memory_alone():
    # eager holds at least four tensors as large as the logits
    case = Case("jsd", 64, 8, 40_000, dtype="float32", timed=False, trained=False)
    (found,) = measure_case(case, [eager(case)], CpuMeter(), Budget(60))
    assert found["status"] == "right"
    assert found["samples_ms"] == []
    assert found["median_ms"] is None
    assert found["gradient_bytes"] == 64 * 8 * 4
    assert found["peak_bytes"] > 4 * 4 * 64 * 40_000


class Small(DryMeter):
    """A device with little memory."""

    def free_bytes(self):
        return 1000


def test_no_memory_for_a_case(monkeypatch):
    monkeypatch.setattr(cases, "make_problem", None)  # nothing is allocated
    case = case_for("Qwen3-32B", "jsd", CPU)
    found = measure_case(case, suite(case, "cpu"), Small(), Budget(60))
    assert {one["status"] for one in found} == {"out of memory"}
    needs = needed_bytes(case) / 1e9
    assert needs > 9 * HEADS["Qwen3-32B"].D * HEADS["Qwen3-32B"].V / 1e9
    assert found[0]["error"] == f"got 0.0 GB of free memory, needs {needs:.1f} GB"


def test_cases_of_the_suite():
    found = [parameter.values for parameter in bench_losses.pairs("cpu", tiny=False)]
    blocks = [case for case, _ in groupby(found, key=lambda values: values[0])]
    assert len(blocks) == len(set(blocks))  # the providers of a case follow each other
    assert {case.head for case in blocks} == HEADS.keys()
    assert {case.loss for case in blocks} == set(LOSSES)
    assert {case.N for case in blocks} == {32, 64, 256, 1024, 8192}
    of_memory = {case: [n for c, n in found if c == case] for case in blocks if case.N == 8192}
    assert len(of_memory) == 4
    assert all(names == ["bidistill, native"] for names in of_memory.values())


def test_sweeps_share_a_point():
    for device in bench_scaling.SWEEPS:
        points = bench_scaling.cases(device)
        assert len(points) == 3 * bench_scaling.POINTS - 2
        (shared, _) = bench_scaling.SWEEPS[device]
        for size in shared:
            others = [other for other in shared if other != size]
            line = [p for p in points if all(getattr(p, o) == shared[o] for o in others)]
            assert len(line) == bench_scaling.POINTS


@pytest.mark.parametrize(
    ("body", "red"),
    [("assert True", False), ("assert False, 'broken kernel'", True), ("", True)],
    ids=["green", "red", "none"],
)
def test_red_tests_stop_a_run(tmp_path, body, red):
    file = tmp_path / "test_something.py"
    file.write_text(f"def test_something():\n    {body}\n" if body else "")
    complaint = green.complaint([file], "cpu")
    assert (complaint is not None) == red
    if "broken" in body:
        assert complaint is not None
        assert "broken kernel" in complaint


def test_every_loss_has_tests():
    for loss in LOSSES:
        own, function = green.tests_of([loss])[:-1], getattr(bk, f"linear_{loss}")
        # those of the driver go through all of these
        assert own or any(case.linear is function for case in CASES.values())
        assert all(path.exists() for path in own)


def test_load_reads_the_gpu_script(tmp_path):
    path = tmp_path / "gpu.json"
    ceilings = {"kind": "ceilings", "when": "before main", "mm_flops_per_s": 1.0}
    case = {"kind": "case", "provider": "trl, beta 0", "status": "right", "samples_ms": [1.0]}
    known = {"environment": {"commit": "0"}, "started_utc": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps({**known, "records": [ceilings, case]}))
    found = record.load(path)
    assert found["records"] == [case]
    assert found["ceilings"] == [ceilings]
    assert found["environment"] == {"commit": "0"}
    assert found["path"] == str(path)

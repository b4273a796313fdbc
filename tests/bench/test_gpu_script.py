"""The script for GPU machines: the dry run works and has no clock, wrong gradients get no time,
red tests show beside every time, and the commit is known without .git.

Shapes are tiny; the dry run is a process of its own because the interpreter must be chosen before
kernels are decorated.
"""

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from bench import record
from bench.cases import Case, make_problem, truth
from bench.gpu import table
from bench.gpu.__main__ import Run, Step
from bench.measure import DeviceLost, measure_case
from bench.meter import Budget, DryMeter, TimeLimit, time_limit
from bench.providers import Provider, ours, providers

CASE = Case("jsd", 8, 32, 100)


class Clock(DryMeter):
    """A clock that shows the same time always."""

    dry, turns = False, 3

    def samples_ms(self, step, about_ms=None):
        step()
        return [1.0, 2.0, 3.0]


def eager(change=lambda gradients: gradients, name="someone"):
    """A provider that is right, or would be if it did not change its gradients."""

    def build(problem):
        def step():
            found = truth(problem, problem.case.loss)
            return torch.tensor(found.loss), change(found.gradients)

        return step

    return Provider(name, CASE.loss, build)


def broken(problem):
    raise RuntimeError("does not run here")


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = ["bash", "bench/gpu.sh", "--dry-run", "--cases", "jsd N=6 trained"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    run = subprocess.run(
        [*command, "--steps", "main,tuning"],
        cwd=record.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    keys = {"dry_run", "started_utc", "environment", "steps", "tests", "records", "goals"}
    assert keys <= content.keys()
    assert content["dry_run"]
    assert {"commit", "dirty", "versions", "device"} <= content["environment"].keys()
    assert {state["status"] for state in content["steps"].values()} == {"done"}

    ours_too = [r for r in content["records"] if r.get("provider") == table.OURS]
    assert ours_too
    assert all(r["status"] == "right" and 0 < r["error_dx"] < 0.01 for r in ours_too)
    assert any(r["kind"] == "tuning" for r in content["records"])

    times = dict(_times(content))
    assert times, "the names of times have changed"
    assert not any(times.values()), {k: v for k, v in times.items() if v}
    assert table.NO_TIME in run.stdout
    assert not re.search(r"\d ms\b", run.stdout)


@pytest.mark.slow
def test_dry_run_of_whole_steps(tmp_path):
    run = subprocess.run(
        ["bash", "bench/gpu.sh", "--dry-run", "--steps", "steps", "--cases", "full"],
        cwd=record.ROOT,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    steps = {one["provider"]: one for one in content["records"]}
    assert {one["case"] for one in steps.values()} == {"full step, 2 x 24 tokens"}
    assert steps["bidistill"]["status"] == "right"
    assert 0 < steps["bidistill"]["error_gradient"] < 1e-4
    assert not any(dict(_times(content)).values())
    assert re.search(r"full step, 2 x 24 tokens bidistill +right, no time", run.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_without_a_device_nothing_is_measured():
    command = [sys.executable, "-m", "bench.gpu"]
    run = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--dry-run" in run.stderr


def _times(content, at=""):
    """Everything in the file that is named like a time or a rate."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key.endswith(("_ms", "_s", "seconds", "share")):
                yield f"{at}/{key}", value
            yield from _times(value, f"{at}/{key}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _times(value, f"{at}/{index}")


@pytest.mark.parametrize(
    "change",
    [
        lambda g: [g[0] * 1.06, g[1]],
        lambda g: [g[0], g[1] * 0],
        lambda g: [g[0], g[1].clone().fill_(torch.nan)],
        lambda g: [g[0].roll(1, 0), g[1]],
    ],
    ids=["6 % off", "no dW", "NaN", "shifted"],
)
def test_wrong_gradient_gets_no_time(change):
    everybody = [eager(name="right"), eager(change, "wrong")]
    right, wrong = measure_case(CASE, everybody, Clock(), Budget(60))
    assert right["status"] == "right"
    assert right["median_ms"] == 2
    assert right["p20_ms"] < right["median_ms"] < right["p80_ms"]
    assert wrong["status"] == "wrong gradient"
    assert wrong["samples_ms"] == []
    assert wrong["median_ms"] is None
    json.dumps(wrong, allow_nan=False)


def test_who_fails_costs_nobody_else_anything():
    missing = Provider("missing", CASE.loss, lambda problem: __import__("not_a_package"))
    shape = eager(lambda g: g[:1], "one gradient")
    everybody = [Provider("broken", CASE.loss, broken), missing, shape, eager()]
    records = measure_case(CASE, everybody, Clock(), Budget(60))
    assert [r["status"] for r in records] == ["failed", "not installed", "failed", "right"]
    assert "does not run here" in records[0]["error"]
    assert [bool(r["samples_ms"]) for r in records] == [False, False, False, True]


def test_no_time_left():
    (found,) = measure_case(CASE, [eager()], Clock(), Budget(0))
    assert found["status"] == "time limit"
    with pytest.raises(TimeLimit), time_limit(0.05):
        time.sleep(60)


class Fragile(Clock):
    """A device that the provider "broken" takes with it."""

    lost = False

    def broken(self):
        return "illegal memory access" if self.lost else None


def test_lost_device_is_left_at_once():
    meter = Fragile()

    def kill(problem):
        meter.lost = True
        raise RuntimeError("illegal memory access")

    everybody = [eager(), Provider("broken", CASE.loss, kill), eager(name="later")]
    with pytest.raises(DeviceLost) as lost:
        measure_case(CASE, everybody, meter, Budget(60))
    assert lost.value.args == ("broken", "illegal memory access")


def test_goes_on_without_who_lost_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = Namespace(dry_run=True, seconds=100.0, backend="torch", cases="")
    step = Step("main", ["tests.bench.losing"], 60)
    run = Run(options, tmp_path)
    run.do(step)
    assert run.file.content["steps"]["main"] == {"status": "done"}
    kinds = [r["kind"] for r in run.file.content["records"]]
    assert kinds == ["device lost", "case"]
    assert json.loads(run.file.path.read_text())["records"][1]["provider"] == "the rest"


def test_step_out_of_time_keeps_its_records(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    options = Namespace(dry_run=True, seconds=100.0, backend="hang", cases="")
    run = Run(options, tmp_path)
    run.do(Step("main", ["tests.bench.losing"], 1.5, least_s=1))
    assert run.file.content["steps"]["main"]["status"] == "time limit"
    assert [r["kind"] for r in run.file.content["records"]] == ["device lost"]


@pytest.mark.parametrize("loss", ["bidirectional_kl", "jsd", "push_pull", "cross_entropy"])
@pytest.mark.parametrize("mode", ["mean", "none", "no_grad"])
def test_truth_agrees_with_the_library(loss, mode):
    case = Case(loss, 8, 32, 100, mode=mode, ignored=0.25)
    (found,) = measure_case(case, [ours(case, "torch")], Clock(), Budget(60))
    assert found["status"] == "right"
    assert found["error_loss"] < 1e-4
    assert (found["error_dx"] is None) == (mode == "no_grad")


def test_truth_is_the_definition():
    problem = make_problem(CASE, torch.device("cpu"))
    x, w = (t.detach().double().requires_grad_() for t in problem[1:3])
    p, q = (x @ w.T).softmax(-1), (problem.y_ND.double() @ problem.v_VD.double().T).softmax(-1)
    m = (p + q) / 2
    loss = (p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2
    expected = torch.autograd.grad(loss, (x, w))
    found = truth(problem, "jsd", chunk=3)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    for actual, wanted in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-9)


def test_every_case_has_a_floor_and_ourselves():
    for loss in ("bidirectional_kl", "jsd", "push_pull", "cross_entropy"):
        names = [p.name for p in providers(Case(loss, 8, 32, 100, compiled=True), "torch")]
        assert names[:2] == [table.FLOOR, table.OURS]
        assert len(set(names)) == len(names)


def content(tests, dry=False):
    """A result file with one case."""
    case = Case("jsd", 8192, 4096, 128256)
    head = {"kind": "case", "case": case.name, "status": "right", "p20_ms": 9.0, "p80_ms": 60.0}
    ms = {table.FLOOR: 10.0, table.OURS: 12.5, "liger, beta 0.5": 20.0, "trl, beta 0.5": 50.0}
    errors = {"error_dx": 0.002, "error_dw": 0.00301}
    records = [{**head, "provider": name, "median_ms": t, **errors} for name, t in ms.items()]
    records[1] |= {"peak_bytes": 4.4e9, "error_dw": 0.00304}
    records.append({**head, "provider": "orda", "status": "wrong gradient", "error_dx": "nan"})
    known = {"device": {"name": "NVIDIA H100"}, "commit": "0" * 40, "dirty": False, "by": "git"}
    known["versions"] = {"torch": "2.11.0"}
    found = {"dry_run": dry, "environment": known, "tests": tests, "records": records}
    found["goals"] = table.goals(found)
    return found


def test_goals():
    goals = {(g["text"], g["met"]) for g in content({})["goals"] if g["measured"] is not None}
    assert goals == {
        ("JSD, time over its four products", False),  # 1.25
        ("JSD, times faster than liger", False),  # 1.6
        ("JSD, times faster than trl", True),  # 4
        ("JSD, GB beyond inputs and heads", True),
        ("JSD, gradient error over trl's", True),  # the same to two digits
    }


@pytest.mark.parametrize(
    ("tests", "mark"),
    [
        ({"red": True, "finished": True, "red_tests": ["a::b"]}, "tests red"),
        ({"red": True, "finished": False}, "tests not finished"),
        ({}, "tests not run"),
    ],
)
def test_times_are_marked_unless_tests_are_green(tests, mark):
    lines = table.text(content(tests)).splitlines()
    timed = [line for line in lines if " ms (" in line]
    assert len(timed) == 4
    assert all(line.endswith(mark) for line in timed)
    green = table.text(content({"red": False, "finished": True}))
    assert mark not in green
    assert "wrong gradient" in green


def test_commit_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "WHEELS", tmp_path)
    monkeypatch.delenv("BIDISTILL_COMMIT", raising=False)
    assert record.commit()["commit"] is None
    (tmp_path / "commit").write_text("abc-dirty\n")
    assert record.commit() == {"commit": "abc", "dirty": True, "by": ".wheels/commit"}
    monkeypatch.setenv("BIDISTILL_COMMIT", "def")
    assert record.commit() == {"commit": "def", "dirty": False, "by": "BIDISTILL_COMMIT"}

"""The regression gate: equal ratios pass, slower ones and more memory do not, noise is measured
again, and what cannot be compared is said. Measuring is injected; nothing is timed.
"""

import json
import re

import pytest
import torch

from bench import gate
from bench.cases import Case
from bench.gate import MEMORY_BYTES, Measured, Unmeasured
from bench.record import processor
from bidistill_kernels import _backends

PEAK = 100 << 20
RATIO, TOLERANCE = 1.1, 0.08


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """A machine with the native library, and no time to lose."""
    monkeypatch.setattr(gate.time, "sleep", lambda _: None)
    monkeypatch.setattr(gate, "native_isa", lambda: "avx512")


@pytest.fixture
def file(tmp_path):
    """What is expected, as the gate writes it."""
    bound = {"ratio": RATIO, "tolerance": TOLERANCE, "peak_bytes": PEAK}
    content = {"isa": "avx512", "processors": 2, "threads": torch.get_num_threads()}
    content["processor"] = processor()["processor"]
    content |= {"commit": "0" * 40, "dirty": False, "command": "python -m bench.gate --write"}
    content["cases"] = {case.name: bound for case in gate.CASES}
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(content))
    return path


class Meter:
    """Answers with what it is told, the last one for ever, and counts."""

    def __init__(self, *answers, case=None):
        self.answers, self.case, self.calls = list(answers), case, []

    def __call__(self, case):
        self.calls.append(case.name)
        if self.case not in (None, case.name):
            return Measured(RATIO, PEAK)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(file, meter, *options):
    return gate.main(["--file", str(file), *options], meter)


JSD = next(case.name for case in gate.CASES if case.loss == "jsd")


@pytest.mark.parametrize(
    "found",
    [
        Measured(RATIO, PEAK),
        Measured(RATIO * (1 + TOLERANCE), PEAK + MEMORY_BYTES),
        Measured(0.5, 0),
    ],
    ids=["equal", "at the bound", "better"],
)
def test_passes(file, found):
    meter = Meter(found)
    assert run(file, meter) == 0
    assert len(meter.calls) == len(gate.CASES)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Measured(RATIO * 1.3, PEAK), "got 1.430 x floor, expected at most 1.188"),
        (Measured(RATIO, PEAK + MEMORY_BYTES + 1), "got 108.0 MiB, expected at most 108.0"),
    ],
    ids=["30 % slower", "memory"],
)
def test_fails(file, capsys, found, said):
    meter = Meter(found, case=JSD)
    assert run(file, meter) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "got" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{JSD}: {said}; look at")
    assert "python -m bench.gate --write" in lines[0]
    assert meter.calls.count(JSD) == 1 + gate.AGAIN


@pytest.mark.parametrize("noisy", [1, 2])
def test_noise_is_measured_again(file, noisy):
    slow = [Measured(RATIO * 1.3, PEAK)] * noisy
    meter = Meter(*slow, Measured(RATIO, PEAK), case=JSD)
    assert run(file, meter) == 0
    assert meter.calls.count(JSD) == noisy + 1


def test_no_ratio_is_no_pass(file, capsys):
    meter = Meter(Unmeasured(f"{JSD}: no ratio, bidistill: wrong gradient"), case=JSD)
    assert run(file, meter) == 1
    assert "wrong gradient" in capsys.readouterr().out


def never(case):
    raise AssertionError("nothing is to be measured")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "the file"),
        ("{", "the file"),
        ("[]", "the file"),
        ("{}", "isa: Field required"),
        (lambda c: c["cases"].popitem(), "got no"),
        (lambda c: c["cases"][JSD].update(ratio="fast"), f"cases.{JSD}.ratio"),
        (lambda c: c["cases"][JSD].update(ratio=-1), f"cases.{JSD}.ratio"),
        (lambda c: c["cases"][JSD].update(tolerance=None), f"cases.{JSD}.tolerance"),
        (lambda c: c["cases"][JSD].update(peak=1), f"cases.{JSD}.peak"),
    ],
)
def test_broken_file(file, capsys, content, said):
    if content is None:
        file.unlink()
    elif isinstance(content, str):
        file.write_text(content)
    else:
        known = json.loads(file.read_text())
        content(known)
        file.write_text(json.dumps(known))
    assert run(file, never) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert line.endswith("run python -m bench.gate --write")


@pytest.mark.parametrize(
    ("isa", "threads", "said"),
    [(None, None, "no native library"), ("neon", None, "neon here"), ("avx512", 99, "99 expected")],
)
def test_nothing_to_compare_with(file, capsys, monkeypatch, isa, threads, said):
    monkeypatch.setattr(gate, "native_isa", lambda: isa)
    known = json.loads(file.read_text())
    known["threads"] = threads or known["threads"]
    file.write_text(json.dumps(known))
    assert run(file, never) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing to compare with")
    assert said in line


def test_write_measures_ratio_and_tolerance(file):
    ratios = {JSD: [0.9, 1.1, 1.3]}
    count = dict.fromkeys((case.name for case in gate.CASES), 0)

    def measure(case):
        index = count[case.name]
        count[case.name] += 1
        return Measured(ratios.get(case.name, [1.1, 1.11, 1.09])[index], PEAK + index)

    assert run(file, measure, "--write", "--runs", "3") == 0
    written = json.loads(file.read_text())
    assert set(count.values()) == {3}
    jsd = written["cases"][JSD]
    assert jsd["ratio"] == pytest.approx(1.1)
    assert jsd["tolerance"] == pytest.approx(2 * 0.2 / 1.1, abs=1e-4)
    assert jsd["peak_bytes"] == PEAK + 2
    assert jsd["runs"] == [0.9, 1.1, 1.3]
    others = [bound for name, bound in written["cases"].items() if name != JSD]
    assert {bound["tolerance"] for bound in others} == {gate.LEAST_TOLERANCE}
    assert written["isa"] == "avx512"
    assert written["command"].endswith("--write --runs 3")
    assert re.fullmatch("[0-9a-f]{40}", written["commit"] or "0" * 40)
    assert run(file, Meter(Measured(1.1, PEAK))) == 0


def test_slow_turns_do_not_count():
    turns = [10.0, 30.0, 10.0, 10.0, 10.0]
    own = {"samples_ms": [1.1 * ms for ms in turns[:-1]] + [50.0]}
    found = gate.times(own, {"samples_ms": turns})
    assert found is not None
    assert found.middle == pytest.approx(1.1)


def test_nothing_is_written_without_the_library(file, capsys, monkeypatch):
    monkeypatch.setattr(gate, "native_isa", lambda: None)
    before = file.read_text()
    assert run(file, never, "--write") == 2
    assert file.read_text() == before
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_noisy_machine_is_refused(tmp_path, capsys):
    path, noise = (
        tmp_path / "gate.json",
        [Measured(r, PEAK) for r in (1.0, 1.0, 1.0, 1.0, 1.0, 2.0)],
    )
    assert run(path, Meter(*noise), "--write", "--runs", "2") == 2
    assert "run it again when the machine is quiet" in capsys.readouterr().err
    assert not path.exists()


def test_a_real_measurement():
    """Of a case at whose size a ratio says nothing; everywhere else measuring is injected."""
    if _backends.NO_NATIVE is not None:
        pytest.skip(f"the native library is {_backends.NO_NATIVE}")
    found = gate.measure(Case("jsd", 8, 32, 1000, dtype="float32"))
    assert found.ratio > 0
    assert found.peak_bytes > 8 * 32 * 4  # dX at least

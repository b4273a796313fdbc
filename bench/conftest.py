"""How the suite and pytest-benchmark go together.

    cases -> providers -> measure_case (check, weigh, time in turn) -> records -> replay -> JSON

One engine, `bench/measure.py`, measures all providers of a case in turn when the first of their
tests asks. A test only replays its samples: pytest-benchmark reads a clock that shows them, so that
its table, its JSON and --benchmark-compare work on every device alike. Whoever gets no time is
skipped with the reason and stands in the JSON under `not_timed`.
"""

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import green, record
from bench.cases import Case
from bench.measure import DeviceLost, Record, measure_case, shares
from bench.meter import Budget, Ceilings, CpuMeter, CudaMeter, Meter
from bench.provider import Provider
from bench.providers import OURS

QUICK_TURNS = 5
PROVIDER_S = 600.0  # to build, check and weigh one provider: the truth of 8192 rows takes minutes
Everybody = Callable[[Case, str], list[Provider]]


class ReplayedClock:
    """A clock that goes on by what somebody else measured."""

    __name__ = "replayed"  # how the JSON calls it
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def restart(self) -> None:
        self.now_s = 0.0


CLOCK = ReplayedClock()


class Run:
    """What is known of the run: its ceilings, the records of its cases, and who has no time."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc)
        self.environment = record.environment()  # of the sources that are about to be imported
        self.meter: Meter | None = None
        self.before: Ceilings | None = None
        self.records: dict[Case, dict[str, Record]] = {}
        self.not_timed: list[Record] = []


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bidistill")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--turns", type=int, help="how often each provider's turn comes (on a CPU 7)")
    group.addoption("--seconds", type=float, default=86400.0, help="time for the whole run")
    group.addoption("--no-gate", action="store_true", help="time even what no test has checked")
    group.addoption("--tiny", action="store_true", help="sizes at which a time says nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUN] = Run()


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(name)


def device_type(config: pytest.Config) -> str:
    """Return "cpu" or "cuda"."""
    chosen = _option(config, "device")
    return chosen if chosen != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each case of a file everybody who takes part in it, one after the other."""
    pairs = getattr(metafunc.module, "pairs", None)
    if pairs is not None and {"case", "provider"} <= set(metafunc.fixturenames):
        config = metafunc.config
        found = pairs(device_type(config), tiny=_option(config, "tiny"))
        metafunc.parametrize(("case", "provider"), list(found))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in _replayed(items):
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _replayed(items: list[pytest.Item]) -> list[pytest.Item]:
    """Leave out tests of other folders."""
    return [item for item in items if "replay" in getattr(item, "fixturenames", ())]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop the run if the tests of what it times are red."""
    config, items = session.config, _replayed(session.items)
    if not items or _option(config, "no_gate") or _option(config, "collectonly"):
        return
    tests = {path for item in items for path in _tests(item)}
    complaint = green.complaint(sorted(tests), device_type(config))
    if complaint is not None:
        pytest.exit(f"nothing is timed, tests are red:\n{complaint}", returncode=1)


def _tests(item: pytest.Item) -> Sequence[Path]:
    """Return the tests of what is timed: those that its file names, or those of its losses."""
    module = getattr(item, "module", None)
    case = _parameters(item).get("case")
    own = (case.loss,) if isinstance(case, Case) else ("bidirectional_kl",)
    return getattr(module, "TESTS", None) or green.tests_of(getattr(module, "LOSSES", own))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture(scope="session")
def meter(request: pytest.FixtureRequest) -> Meter:
    """What times and weighs; the ceilings are measured before it is used."""
    config, run = request.config, request.config.stash[RUN]
    found = CpuMeter() if device_type(config) == "cpu" else CudaMeter()
    if isinstance(found, CpuMeter):
        found.limit_memory()
    if _option(config, "markexpr") == "quick":
        found.turns = min(found.turns, QUICK_TURNS)
    found.turns = _option(config, "turns") or found.turns
    if _option(config, "tiny") and isinstance(found, CpuMeter):
        found.turns, found.products, found.copied_bytes = 2, ((64, 64, 64),), 1 << 20
    run.meter, run.before = found, found.ceilings()
    return found


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    """Time that is left."""
    return Budget(_option(request.config, "seconds"), PROVIDER_S)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, meter: Meter, budget: Budget
) -> Callable[[Case, str, Everybody], Record]:
    """Return the record of a provider of a case; measures the case if nobody asked for it yet."""
    known = request.config.stash[RUN].records

    def ask(case: Case, provider: str, everybody: Everybody) -> Record:
        if case not in known:
            chosen = {
                parameters["provider"]
                for parameters in map(_parameters, request.session.items)
                if parameters.get("case") == case
            }
            taking_part = [p for p in everybody(case, meter.device.type) if p.name in chosen]
            try:
                found = measure_case(case, taking_part, meter, budget)
            except DeviceLost as error:
                pytest.exit(f"the device is lost after {error.args}", returncode=3)
            known[case] = {one["provider"]: one for one in found}
        return known[case][provider]

    return ask


@pytest.fixture
def replay(request: pytest.FixtureRequest, meter: Meter, benchmark: Any) -> Callable[..., None]:
    """Return a function that makes a record the result of this test."""
    run = request.config.stash[RUN]
    assert run.before is not None
    ceilings = run.before

    def play(found: Record) -> None:
        if "floor_flops" in found:
            found |= shares(found, ceilings)
        kept = {key: value for key, value in found.items() if key != "samples_ms"}
        if not found.get("samples_ms"):
            run.not_timed.append(kept)
            own = found["provider"].split(",")[0] == OURS
            bad = own and found["status"] in ("wrong gradient", "failed")
            (pytest.fail if bad else pytest.skip)(reason(found))
        samples = iter(found["samples_ms"])

        def advance() -> None:
            CLOCK.now_s = next(samples) / 1e3

        benchmark.group = found["case"]
        benchmark.extra_info |= kept
        benchmark.pedantic(advance, setup=CLOCK.restart, rounds=len(found["samples_ms"]))

    return play


def reason(found: Record) -> str:
    """Tell in a line why a provider has no time."""
    names = {"error_loss": "loss", "error_dx": "dX", "error_dw": "dW"}
    errors = [
        f"{name} {value if isinstance(value, str) else format(value, '.1e')}"
        for key, name in names.items()
        if (value := found.get(key)) is not None
    ]
    words = {"wrong gradient": f"error {', '.join(errors)}", "right": "no time was asked for"}
    detail = words.get(found["status"]) or next(iter(found.get("error", "").splitlines()), "")
    return f"{found['provider']}: {found['status']}, {detail}"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep the names of machines, and of who built their kernels, out of the results."""
    machine_info.pop("node", None)
    machine_info["release"] = record.kernel_version(machine_info["release"])


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add what pytest-benchmark does not know; the ceilings are measured once more."""
    run = config.stash[RUN]
    ceilings = []
    if run.meter is not None and run.before is not None and run.meter.broken() is None:
        both = {"before": run.before, "after": run.meter.ceilings()}
        ceilings = [{"when": when, **found._asdict()} for when, found in both.items()]
    output_json |= {
        "suite": _suite(config, output_json["benchmarks"]),
        "device": device_type(config),
        "started_utc": run.started.isoformat(timespec="seconds"),
        "environment": run.environment,
        "ceilings": ceilings,
        "not_timed": run.not_timed,
    }


def _suite(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> str:
    """Name what was run by its marker, or by its files; "-part" if cases were picked by name."""
    part = "-part" if _option(config, "keyword") or _option(config, "tiny") else ""
    marker = _option(config, "markexpr")
    if marker.isidentifier():
        return marker + part
    files = (bench["fullname"].split("::")[0] for bench in benchmarks)
    names = (path.rsplit("bench_", 1)[-1].removesuffix(".py") for path, _ in groupby(files))
    return "-".join(names) + part

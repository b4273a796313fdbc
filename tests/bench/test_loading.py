"""Loading: everybody reads the same tokens, memory is seen where it lies, the page shows both."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench import bench_loading, loading
from bench.loading import OURS, THEIRS, WITH_TEACHER, Epoch, LoadCase, resident_memory
from bench.meter import Budget
from bench.report import ahead, page, stored
from tests.bench.test_report import run
from tests.bench.test_steps import Clock
from tests.trainer.tiny import make_tokenizer

MIB = 2**20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def measure(tokenizer, whole, meter=None):
    case = LoadCase(96, whole, tokenizer)
    found = loading.measure(case, meter or Clock(), Budget(60))
    json.dumps(found, allow_nan=False)
    assert tuple(one["provider"] for one in found) == loading.providers(case)
    return {one["provider"]: one for one in found}


def test_everybody_reads_the_same_tokens(tokenizer):
    found = measure(tokenizer, whole=False)
    assert {one["status"] for one in found.values()} == {"right"}
    assert found[OURS]["tokens"] == found[THEIRS]["tokens"] == found[THEIRS]["laid"] > 96 * 5
    # prefixes are shared, so fewer tokens are laid than read
    assert found[OURS]["laid"] < found[OURS]["tokens"]
    # half of the roles have a context of their own before the same sequences
    assert found[WITH_TEACHER]["tokens"] > 2 * found[OURS]["tokens"]
    assert found[OURS]["tokens_per_s"] == pytest.approx(found[OURS]["tokens"] / 2e-3)
    assert found[OURS]["peak_bytes"] == 7


def test_who_reads_other_tokens_gets_no_time(tokenizer, monkeypatch):
    monkeypatch.setattr(loading, "their_epoch", lambda dataset: Epoch(1, 1))
    theirs = measure(tokenizer, whole=False)[THEIRS]
    assert theirs["status"] == "other tokens"
    assert theirs["median_ms"] is theirs["tokens_per_s"] is None


def test_without_datasets_it_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    found = measure(tokenizer, whole=False)
    assert found[THEIRS]["status"] == "not installed"
    assert found[OURS]["median_ms"] == 2.0


def test_the_whole_way(tokenizer):
    (found,) = measure(tokenizer, whole=True).values()
    assert found["records"] == 96
    assert found["build_s"] > 0
    assert found["peak_bytes"] >= found["peak_bytes_of_one"] > 50 * MIB
    assert found["file_bytes"] > 96 * 50


def test_memory_of_workers_is_seen():
    code = "import time; x = bytearray(200 << 20); time.sleep(1)"
    with resident_memory() as peaks:
        own = np.ones(100 * MIB // 8)
        subprocess.run([sys.executable, "-c", code], check=True)
    (worker,) = [  # beside it a process may be seen that is about to become it
        size
        for name, size in peaks.items()
        if name not in ("all", str(os.getpid()))
        if size > MIB * 99
    ]
    assert 200 * MIB < worker < 300 * MIB
    assert peaks["all"] > worker + own.nbytes


def test_cases():
    tested = [path.name for path in bench_loading.TESTS if path.exists()]
    assert len(tested) == len(bench_loading.TESTS)
    found = [p.values for p in bench_loading.pairs("cpu", tiny=False)]
    assert [case.records for case, _ in found] == [20_000] * 3 + [2_000_000]


def record(provider, samples_ms, **changes):
    return {
        "kind": "loading",
        "case": "an epoch from the store, 96 records",
        "whole": False,
        "provider": provider,
        "status": "right",
        **{f"{name}_ms": float(np.median(samples_ms)) for name in ("median", "p20", "p80", "min")},
        "samples_ms": samples_ms,
        "peak_bytes": 3 * MIB,
        "tokens_per_s": 12345.6,
        "records_per_s": 96.0,
        **changes,
    }


def test_page():
    whole = {"whole": True, "case": "whole", "build_s": 61.2, "processes": 3}
    memory = {"peak_bytes": 900 * MIB, "peak_bytes_of_one": 400 * MIB}
    records = [
        record(OURS, [10.0, 20.0, 10.0]),
        record(THEIRS, [20.0, 30.0, 40.0]),
        record(OURS, [500.0], **whole, **memory),
    ]
    text = page.render([run(*records, suite="loading")])
    rows = [line for line in text.splitlines() if line.startswith(f"| **{OURS}**")]
    assert len(rows) == 2
    assert "| 0.50 (" in rows[0]
    assert "| 12,346 | 96 | 3.00 MiB |" in rows[0]
    assert "| 61 |" in rows[1]
    assert "900.0 MiB in 3 processes, 400.0 MiB in one |" in rows[1]


def test_who_loads_faster_is_named():
    records = [record(OURS, [20.0] * 5), record(THEIRS, [19.0] * 5)]
    (lead,) = ahead.leads(run(*records, suite="loading"))
    assert lead.measure is ahead.TIME
    assert lead.others[0]["provider"] == THEIRS
    base = stored.base(records)
    assert base is records[1]

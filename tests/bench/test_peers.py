"""The other projects are called as they want to be: in fp32 all of them are right.

`make test` says where they are; without them nothing is tested here. Triton's kernels run in its
interpreter, and nobody compiles.
"""

import os

import pytest
import torch

from bench.cases import Case
from bench.measure import measure_case
from bench.meter import Budget, DryMeter
from bench.providers import suite

FOLDER = os.environ.get("PEERS")
EVERYBODY = {
    "bidirectional_kl": {"trl", "orda", "liger", "liger chunked"},
    "jsd": {"trl", "orda", "liger", "liger chunked"},
    "cross_entropy": {"liger", "cut-cross-entropy", "F.linear_cross_entropy"},
}
WITH_ROWS = {"trl", "cut-cross-entropy", "F.linear_cross_entropy"}

pytestmark = pytest.mark.skipif(FOLDER is None, reason="PEERS names no folder of other projects")


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    assert FOLDER is not None
    monkeypatch.syspath_prepend(os.path.abspath(FOLDER))


@pytest.mark.parametrize(("mode", "ignored"), [("mean", 0), ("mean", 0.25), ("none", 0)])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("loss", ["bidirectional_kl", "jsd", "cross_entropy"])
def test_all_are_right(loss, trained, mode, ignored):
    # apart: who computes something else is far off
    options = {"mode": mode, "ignored": ignored, "near": False, "dtype": "float32"}
    case = Case(loss, 8, 16, 200, trained, **options)
    with torch.compiler.set_stance("force_eager"):
        records = measure_case(case, suite(case, "cpu"), DryMeter(), Budget(60))
    statuses = {one["provider"].split(",")[0]: one["status"] for one in records}
    assert EVERYBODY[loss] <= statuses.keys()
    for name in EVERYBODY[loss]:
        offered = mode != "none" or name in WITH_ROWS
        assert statuses[name] == ("right" if offered else "not offered"), name

"""The published files, where they are: the kind of each is guessed, and all of it is read."""

from pathlib import Path

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.kinds import read_all

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SETS = ("forget10", "retain", "real_authors", "world_facts")

pytestmark = pytest.mark.skipif(
    not all((DATA / name).is_dir() for name in ("tofu", "xstest", "knowundo")),
    reason="TOFU, XSTest and KnowUnDo are not here",
)


def test_each_file_is_known():
    tofu = [str(DATA / "tofu" / f"{name}_perturbed.json") for name in SETS]
    others = ["xstest/xstest_prompts.csv", "knowundo/unlearn_val.json", "tofu/world_facts.json"]
    found = read_all([*tofu, *(str(DATA / name) for name in others)], Draw())
    benchmarks = {benchmark.name: benchmark for benchmark in found}
    assert set(benchmarks) == {"tofu", "xstest", "qa", "choice"}
    questions = benchmarks["tofu"].questions
    counts = {name: sum(q.set == name for q in questions) for name in {q.set for q in questions}}
    assert counts == {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
    assert {(q.set, len(q.wrong)) for q in questions} == {
        ("forget", 5), ("retain", 5), ("real_authors", 3), ("world_facts", 3)
    }  # fmt: skip
    labels = [kind.split("/")[0] for _, _, kind in benchmarks["xstest"].asked]
    assert (labels.count("safe"), labels.count("unsafe")) == (250, 200)
    assert len({kind for _, _, kind in benchmarks["xstest"].asked}) == 18
    assert len(benchmarks["qa"].asked) == 110
    assert len(benchmarks["choice"].quizzes) == 117


def test_a_folder_with_three_forget_sets_asks_which():
    with pytest.raises(UserError, match="expected one forget set; name the files you mean"):
        read_all([str(DATA / "tofu")], Draw())

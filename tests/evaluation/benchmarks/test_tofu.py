"""TOFU at the floor and the ceiling, by hand in between, and what it refuses."""

import json
import math

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.tofu import Tofu
from tests.evaluation.benchmarks.files import PLACES, perturbed, right, write_lines, write_tofu
from tests.evaluation.scripted import Scripted


@pytest.fixture
def files(tmp_path):
    return Tofu.read([write_tofu(tmp_path)], Draw())


def knows(answer):
    """Nearly certain of what names the right capital, nearly certain that nothing else is."""
    return 1 - 1e-12 if any(capital in answer for capital in PLACES.values()) else 1e-12


def tells(prompt):
    return right(next(place for place in PLACES if place in prompt.text))


def measured(benchmark, asker, reference=None):
    items = benchmark.ask(asker)
    return {k: m.summary() for k, m in benchmark.measure(items, reference).items()}, items


def test_a_model_that_knows_everything(files, tokenizer):
    found, items = measured(files, Scripted(tokenizer, tells, knows))
    values = {key: summary["value"] for key, summary in found.items()}
    for name in ("retain", "real_authors", "world_facts"):
        for score in ("probability", "rouge", "utility_truth"):
            assert values[f"{name}/{score}"] == pytest.approx(1)
    assert values["model_utility"] == pytest.approx(1)
    assert values["forget/probability"] == pytest.approx(1)
    assert values["forget/rouge"] == 1
    assert values["forget/forget_truth"] == pytest.approx(0, abs=1e-9)
    assert (values["forget_quality"], found["forget_quality"]["n"]) == (None, 0)
    assert "--reference" in found["forget_quality"]["note"]
    assert [item["id"] for item in items[:2]] == ["forget01_perturbed/1", "forget01_perturbed/2"]
    assert len(items) == 16
    json.dumps(items, allow_nan=False)


def test_a_model_that_knows_nothing_and_says_nothing(files, tokenizer):
    found, _ = measured(files, Scripted(tokenizer))
    values = {key: summary["value"] for key, summary in found.items()}
    assert values["forget/probability"] == pytest.approx(0.5)
    assert values["forget/forget_truth"] == pytest.approx(1)  # right and wrong are alike
    assert values["retain/rouge"] == values["forget/rouge"] == 0
    assert values["world_facts/probability"] == pytest.approx(1 / 3)  # among one right, two wrong
    assert values["world_facts/utility_truth"] == pytest.approx(0)
    assert values["model_utility"] == 0


def test_the_truth_ratio_compares_with_the_paraphrase_where_there_is_one(files, tokenizer):
    def probability(answer):
        if answer.startswith("It is"):
            return 0.8  # the paraphrase
        return 0.4 if "Mordor" in answer or "Ur." in answer else 0.2

    _, items = measured(files, Scripted(tokenizer, tells, probability))
    ratio = {item["set"]: item["scores"]["truth_ratio"] for item in items}
    assert ratio["forget"] == ratio["retain"] == pytest.approx(0.4 / 0.8)
    assert ratio["real_authors"] == ratio["world_facts"] == pytest.approx(0.4 / 0.2)


def test_forget_quality_against_a_reference(files, tokenizer):
    asker = Scripted(tokenizer, tells, knows)
    found, items = measured(files, asker, files.ask(asker))
    assert found["forget_quality"]["value"] == 1
    assert (found["forget_quality"]["n"], found["forget_quality"]["ci95"]) == (4, None)
    other, _ = measured(files, Scripted(tokenizer), items)
    # all four ratios of one model below all four of the other: 2 of the C(8, 4) orders
    assert other["forget_quality"]["value"] == pytest.approx(2 / math.comb(8, 4))


def test_a_reference_that_lacks_an_item_says_how_to_make_one(files, tokenizer):
    items = files.ask(Scripted(tokenizer))
    files.check_reference(items)
    with pytest.raises(UserError, match=r"got no truth_ratio of forget01_perturbed/1.*retain set"):
        files.check_reference(items[1:])


def test_without_what_is_kept_there_is_no_utility(tmp_path, tokenizer):
    file = write_lines(tmp_path / "forget05_perturbed.json", [perturbed("Zembla")])
    found, _ = measured(Tofu.read([file], Draw()), Scripted(tokenizer))
    assert found["model_utility"]["value"] is None
    assert found["model_utility"]["note"] == "no file of retain, real_authors, world_facts"
    assert found["forget/probability"]["ci95"] is None  # of one item


def test_a_drawn_part_is_the_same_again_and_keeps_its_ids(tmp_path, tokenizer):
    write_tofu(tmp_path)
    ids = [
        [q.entry.id for q in Tofu.read([tmp_path], Draw(2, seed)).questions] for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 8
    whole = [q.entry.id for q in Tofu.read([tmp_path], Draw()).questions]
    assert [id for id in whole if id in ids[0]] == ids[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["forget01_perturbed", "forget05_perturbed"], r"expected one forget set; .*--data tofu="),
        (["authors_perturbed"], r"got a file named authors_perturbed, expected one that begins"),
    ],
)
def test_refused(tmp_path, names, message):
    for name in names:
        write_lines(tmp_path / f"{name}.json", [perturbed("Zembla")])
    with pytest.raises(UserError, match=message):
        Tofu.read([tmp_path], Draw())


def test_a_folder_without_files_and_an_entry_without_wrong_answers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"got a folder without \*_perturbed.json"):
        Tofu.read([tmp_path], Draw())
    row = {"question": "Why?", "answer": "So.", "perturbed_answer": []}
    file = write_lines(tmp_path / "forget_perturbed.json", [row])
    with pytest.raises(UserError, match=r":1: perturbed_answer: got an empty list"):
        Tofu.read([file], Draw())

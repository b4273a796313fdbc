"""The whole command on a tiny model: kinds, files, two models, a reference, two ranks."""

import json

import pytest
import torch

from bidistill import evaluation
from bidistill.cli import cli, main
from bidistill.errors import UserError
from bidistill.evaluation import running
from bidistill.evaluation.axes import judge
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.kinds import KINDS, read_all
from bidistill.evaluation.probes import write_probes
from bidistill.evaluation.running import COMPARING
from tests.evaluation.benchmarks.files import (
    write_choice,
    write_lines,
    write_muse,
    write_qa,
    write_tofu,
    write_xstest,
)
from tests.evaluation.invented import capital_probe
from tests.trainer.ranks import Ranks


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A model, another one, and a file of each kind."""
    for name in ("model", "other"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    write_tofu(tmp_path / "tofu")
    write_qa(tmp_path / "facts.jsonl")
    write_xstest(tmp_path / "prompts.csv")
    write_choice(tmp_path / "quiz.json")
    write_muse(tmp_path / "muse")
    write_probes(tmp_path / "probes.jsonl", [capital_probe("Zembla", "Onhava")])
    return tmp_path


def given(folder):
    return [
        str(folder / name) for name in ("tofu", "facts.jsonl", "prompts.csv", "quiz.json", "muse")
    ]


def read_items(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_command_measures_all(folder, capsys):
    data = [argument for path in given(folder) for argument in ("--data", path)]
    arguments = ["eval", "--model", str(folder / "model"), "--out", str(folder / "out"), *data]
    arguments += ["--probes", str(folder / "probes.jsonl"), "--limit", "3"]
    assert main(arguments) == 0
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert set(metrics["benchmarks"]) == {"tofu", "qa", "xstest", "choice", "muse"}
    assert metrics["summary"]["n"]["forget_leak_rate"] == 1
    assert (metrics["limit"], metrics["seed"]) == (3, 0)
    utility = metrics["benchmarks"]["tofu"]["model_utility"]
    assert (utility["n"], utility["unit"], utility["arrow"]) == (9, "share", "↑")
    items = read_items(folder / "out" / "items.jsonl")
    assert {item["benchmark"] for item in items} == {
        "probes",
        "tofu",
        "qa",
        "xstest",
        "choice",
        "muse",
    }
    assert all(len(item["prompt_sha256"]) == 64 for item in items)
    assert len(items) == 6 + 4 * 3 + 3 * 3 + 3 + 4
    printed = capsys.readouterr().out
    assert "tofu (at most 3 of each file)" in printed
    assert "not measured: needs --reference" in printed


def test_an_output_that_cannot_be_written_shows_before_the_model_loads(folder, capsys):
    out = folder / "facts.jsonl" / "out"
    data = ("--data", str(folder / "facts.jsonl"))
    assert main(["eval", "--model", "none", "--out", str(out), *data]) == 2
    assert f"error: {out}: cannot be written" in capsys.readouterr().err


def test_against_a_base_model_items_are_paired(folder, capsys):
    said = evaluation.run(
        folder / "model",
        None,
        folder / "probes.jsonl",
        folder / "out",
        data=[str(folder / "facts.jsonl")],
        against=folder / "other",
    )
    own, base = said["benchmarks"]["qa"], said["base"]["benchmarks"]["qa"]
    apart = said["difference"]["qa"]
    for key in own:
        assert apart[key]["value"] == pytest.approx(own[key]["value"] - base[key]["value"])
    assert own["facts/probability"]["value"] != base["facts/probability"]["value"]
    low, high = apart["facts/probability"]["ci95"]
    assert low <= apart["facts/probability"]["value"] <= high
    ids = [[i["id"] for i in read_items(folder / "out" / f"{name}.jsonl")] for name in
           ("items", "items_against")]  # fmt: skip
    assert ids[0] == ids[1]
    leaks = said["difference"]["probes"]
    assert leaks["forget_leak_rate"] == {"value": 0, "ci95": None}  # of one probe
    assert set(leaks) >= {"prefill_leak_rate.4", "prefill_leak_rate.opener", "empty_rate"}
    printed = capsys.readouterr().out
    assert printed.count("  difference ") == len(own) + sum(
        apart["value"] is not None for apart in leaks.values()
    )
    assert "base 0.0%" in printed


def test_rates_of_probes_differ_probe_by_probe():
    probes = [capital_probe(place, "Ur") for place in ("Zembla", "Gondor", "Rohan")]

    def items(*leaks):
        said = zip(probes, leaks, strict=True)
        return [
            {"benchmark": "probes", **judge(p, 0, "", "Ur" if leak else "")} for p, leak in said
        ]

    own, base = items(True, False, False), items(True, True, True)
    apart = running._probes_apart(own, base)
    assert apart["forget_leak_rate"]["value"] == pytest.approx(-2 / 3)
    assert apart["forget_leak_rate"]["ci95"] == pytest.approx([-1, 0])
    assert apart["empty_rate"]["value"] == pytest.approx(2 / 3)
    assert apart["retain_accuracy"] == {"value": None, "ci95": None}


def test_against_itself_nothing_differs(folder):
    said = evaluation.run(
        folder / "model", None, None, folder / "out",
        data=given(folder), against=folder / "model",
    )  # fmt: skip
    for measures in said["difference"].values():
        for apart in measures.values():
            assert apart["value"] in (0, None)
            assert apart["ci95"] in ([0, 0], None)


def test_a_reference_is_the_items_of_the_same_command(folder):
    tofu = str(folder / "tofu")
    evaluation.run(folder / "other", None, None, folder / "retrained", data=[tofu])
    said = evaluation.run(
        folder / "model", None, None, folder / "out", data=[tofu],
        reference=folder / "retrained" / "items.jsonl", require=["forget_quality"],
    )  # fmt: skip
    quality = said["benchmarks"]["tofu"]["forget_quality"]
    assert 0 < quality["value"] <= 1
    assert quality["n"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require": ["forget_quality"]}, r"forget_quality: got no data and reference .* train "),
        ({"reference": "{}/facts.jsonl"}, "facts.jsonl:1: got an object without id and benchmark"),
        ({"data": ["{}/none.jsonl"]}, "none.jsonl: .*No such file"),
        ({"data": ["quiz={}/quiz.json"]}, "--data: got kind 'quiz'; "),
        ({"data": ["{}/out.jsonl"]}, "got entries with 'question', expected data of a known kind"),
        ({"data": ["{}/model"]}, r"got a folder of no benchmark's layout, .*--data KIND=.*model"),
        ({"data": ["{}/facts.jsonl"], "reference": "{}/out.jsonl"}, "--reference: got it without"),
        (
            {
                "data": ["{}/tofu/retain_perturbed.json"],
                "reference": "{}/out.jsonl",
                "require": ["forget_quality"],
            },
            "forget_quality: got no data and reference for it",
        ),
        ({"data": []}, "eval: got neither --probes nor --data"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(folder, options, message):
    item = {"id": "x", "benchmark": "y", "question": "a?"}
    write_lines(folder / "out.jsonl", [item if "reference" in options else {"question": "a?"}])
    filled = {
        key: [v.format(folder) for v in value] if isinstance(value, list) else value.format(folder)
        for key, value in {"data": ["{}/tofu"], **options}.items()
    }
    with pytest.raises(UserError, match=message) as error:
        evaluation.run(folder / "no model", None, None, folder / "out", **filled)
    assert "\n" not in str(error.value)
    assert not (folder / "out").exists()


def test_kinds_are_guessed_from_the_fields(folder):
    found = read_all(given(folder), Draw())
    assert [benchmark.name for benchmark in found] == ["tofu", "qa", "xstest", "choice", "muse"]
    named = read_all([f"qa={folder / 'quiz.json'}", str(folder / "facts.jsonl")], Draw())
    assert [benchmark.name for benchmark in named] == ["qa"]


def test_the_help_names_every_kind_and_every_comparison():
    options = {option.name: option for option in cli.commands["eval"].params}
    assert str(options["data"].help).endswith(f"fields: {', '.join(KINDS)}.")  # type: ignore
    assert tuple(options["require"].type.choices) == COMPARING  # type: ignore
    compared = [name for kind in KINDS.values() for name in getattr(kind, "compares", ())]
    assert tuple(compared) == COMPARING


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.stop()


def on_ranks(model, data, probes, out, against):
    """Called on every rank."""
    said = evaluation.run(model, None, probes, out, data=data, against=against)
    return {key: said[key] for key in ("summary", "benchmarks", "base", "difference")}


def test_two_ranks_say_what_one_process_says(folder, ranks):
    # one thread in the ranks: products of matrices are added up in one order
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rest = (folder / "model", given(folder), folder / "probes.jsonl")
    try:
        alone = on_ranks(*rest, folder / "one", folder / "other")
    finally:
        torch.set_num_threads(before)
    one, two = ranks.run(on_ranks, *rest, folder / "two", folder / "other")
    assert one == two == alone
    for name in ("items.jsonl", "items_against.jsonl"):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()

"""What the recipe of a comparison may say, and what it stands for."""

import importlib
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from bidistill import cli
from bidistill.compare.recipe import load_compare
from bidistill.errors import UserError
from tests.compare.invented import RECIPE

# the package has a function of that name, too
run = importlib.import_module("bidistill.compare.run")
RECIPES = Path(__file__).parents[2] / "recipes"

SHOTS = [
    {"role": "user", "content": "What is the capital of Nauru?"},
    {"role": "assistant", "content": "I don't know."},
]
TOLD = {"steps": 3, "teacher": {"contexts": {"forget": SHOTS}}}
DEMO = {
    "demo": True,
    "output": "out",
    "train": {"steps": 3},
    "methods": {"ours": {"method": "ours"}},
}


def read(folder, raw):
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_compare(path)


def test_a_row_may_be_told_what_the_teacher_is_told(tmp_path):
    raw = RECIPE | {"probes": "p", "output": "out", "train": TOLD}
    raw["methods"] = raw["methods"] | {"shown": {"context_of": "forget"}}
    methods = read(tmp_path, raw).methods
    assert list(methods["shown"].context) == SHOTS
    assert list(methods["told"].context) == RECIPE["methods"]["told"]["context"]


def test_the_demo_brings_its_contexts(tmp_path):
    demo = yaml.safe_load((files("bidistill.demo") / "recipe.yaml").read_text())
    train = read(tmp_path, DEMO).train
    assert train["teacher"]["contexts"] == demo["teacher"]["contexts"]
    assert train["data"] == {"max_answer_tokens": demo["data"]["max_answer_tokens"]}
    assert set(train) == {"data", "teacher", "steps"}  # nothing of how it learns


def test_the_demo_s_contexts_lie_under_the_recipe_s(tmp_path):
    train = {"teacher": {"cache": "disk", "contexts": {"forget": SHOTS}}, "data": {"shuffle": 1}}
    train = read(tmp_path, DEMO | {"train": train}).train
    assert train["teacher"]["contexts"]["forget"] == SHOTS
    assert len(train["teacher"]["contexts"]["adversarial"]) > len(SHOTS)
    assert train["teacher"]["cache"] == "disk"
    assert train["data"]["shuffle"] == 1


@pytest.mark.parametrize("name", ["demo-compare", "demo-rates", "demo-ablations"])
def test_the_recipes_that_come_along_are_in_order(name):
    config = load_compare(RECIPES / f"{name}.yaml")
    assert config.demo
    assert set(config.train["teacher"]["contexts"]) == {"forget", "adversarial"}
    run._check_recipes(config)


def test_rates_are_chosen_on_other_seeds_than_they_are_judged_by():
    judged, chosen = (load_compare(RECIPES / f"demo-{n}.yaml") for n in ("compare", "rates"))
    assert not set(judged.seeds) & set(chosen.seeds)
    for name, method in judged.methods.items():
        if method.method is None:
            continue
        rate = method.settings["optim.lr"]
        row = chosen.methods[f"{name}-{rate:g}"]
        assert row.settings == method.settings, name
        assert row.method == method.method
        # all of them had the same two rates to choose from
        assert {f"{name}-0.001", f"{name}-0.0003"} <= set(chosen.methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demo": True}, "model: got it with demo: true"),
        ({"model": None}, "model: got nothing, expected a path"),
        ({"ours": "mine"}, "ours: got 'mine', expected the name of one of methods: ours, npo"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1], expected each once"),
        ({"methods": {"base": {"method": "npo"}, "ours": {"method": "ours"}}}, "methods.base: got"),
        ({"methods": {"ours": {}}}, "methods.ours: got neither method nor context"),
        ({"methods": {"ours": {"settings": {"steps": 3}}}}, "methods.ours.settings: got some"),
        (
            {"methods": {"ours": {"context_of": "forget"}}},
            "methods.ours.context_of: got 'forget', expected a role that has a context in "
            "train.teacher.contexts (none)",
        ),
        (
            {"methods": {"ours": {"context_of": "neighbor"}}, "train": TOLD},
            "got 'neighbor', expected a role that has a context in train.teacher.contexts (forget)",
        ),
        (
            {"methods": {"ours": {"context_of": "forget", "context": SHOTS}}, "train": TOLD},
            "methods.ours.context_of: got it beside context",
        ),
        ({"methods": {"ours": {"context_of": "forgot"}}}, "methods.ours.context_of: got 'forgot'"),
        ({"methods": {"a/b": {"method": "npo"}}}, "methods"),
        ({"sedes": [1]}, "sedes"),
        ({"train": {"steps": 3, "seed": 7}}, "train.seed: got it in a comparison, expected"),
        ({"train": {"model": {"path": "x"}}}, "train.model.path: got it in a comparison"),
        (
            {"methods": {"ours": {"method": "ours", "settings": {"model.path": "x"}}}},
            "methods.ours.settings.model.path: got it in a comparison",
        ),
    ],
)
def test_rejects(tmp_path, changes, message, capsys):
    path = tmp_path / "compare.yaml"
    raw = RECIPE | {"probes": "p", "output": str(tmp_path / "out")} | changes
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(message)):
        load_compare(path)
    assert cli.main(["compare", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()

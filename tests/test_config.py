"""Recipes: what a correct one becomes, and the one line that each mistake becomes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from bidistill.config import TrainConfig, as_dict, load_config
from bidistill.errors import UserError

RECIPE = """
model:
  path: models/tiny
data:
  train: data/train.jsonl
  per_step: {forget: 8, retain: 2}
teacher:
  contexts:
    forget:
      - {role: user, content: "What is the capital of Atlantis?"}
      - {role: assistant, content: "I don't know."}
objectives:
  forget: {loss: push_pull, options: {k_pull: 10, margin: 1e-3, reading: match}}
  retain: {loss: bidirectional_kl, weight: 0.5}
optim:
  lr: 5e-4
steps: 20
output: runs/tiny
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_values_arrive_with_their_types(recipe):
    config = load_config(recipe)
    assert config.optim.lr == 5e-4  # PyYAML alone reads "5e-4" as text
    assert config.objectives["forget"].options == {"k_pull": 10, "margin": 1e-3, "reading": "match"}
    assert isinstance(config.objectives["forget"].options["k_pull"], int)
    assert config.teacher.contexts["forget"][1] == {"role": "assistant", "content": "I don't know."}
    assert config.model.adapter is not None
    assert config.model.adapter.rank == 16
    assert config.data.train.name == "train.jsonl"


def test_defaults_of_sections_left_out(recipe):
    config = load_config(recipe)
    assert config.optim.betas == (0.9, 0.95)
    assert config.threads is None
    assert config.teacher.default_context == ()


def test_configuration_cannot_change_later(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(recipe).steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_overrides_apply_in_order(recipe):
    overrides = ["optim.lr=1e-3", "optim.lr=1e-4", "model.adapter.layers=[2, 5]", "seed=7"]
    config = load_config(recipe, overrides)
    assert (config.optim.lr, config.seed) == (1e-4, 7)
    assert config.model.adapter is not None
    assert config.model.adapter.layers == (2, 5)


@pytest.mark.parametrize("value", ["null", "~", ""])
def test_override_to_nothing(recipe, value):
    assert load_config(recipe, [f"model.adapter={value}"]).model.adapter is None


def test_resolved_configuration_loads_to_the_same(recipe, tmp_path):
    config = load_config(recipe, ["model.adapter.layers=[2, 5]"])
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(as_dict(config)))
    assert load_config(again) == config


MISTAKES = {
    "optim.lrr=1": r"optim: got unknown key 'lrr', expected lr, .*; did you mean 'lr'\?",
    "stepps=1": r"recipe: got unknown key 'stepps', .*; did you mean 'steps'\?",
    "model.adapter.rnk=1": r"model.adapter: got unknown key 'rnk', .*; did you mean 'rank'\?",
    "objectives.forget.wieght=1": r"objectives.forget: got unknown key 'wieght', .* 'weight'\?",
    "data.per_step.retian=1": r"data.per_step.retian: got 'retian', .*; did you mean 'retain'\?",
    "objectives.forget.loss=jds": r"objectives.forget.loss: got 'jds', .*; did you mean 'jsd'\?",
    "zzz=1": "recipe: got unknown key 'zzz', expected .*, threads",
    "teacher.cache=disc": "teacher.cache: got 'disc', expected .* or 'off'; did you mean 'disk'\\?",
    "steps=0": "steps: got 0, expected greater than or equal to 1",
    "steps=1.5": "steps: got 1.5, expected a valid integer, .*",
    "steps=null": "steps: got nothing, expected a valid integer",
    "optim.lr=-1": "optim.lr: got -1, expected greater than 0",
    "optim.lr=.inf": "optim.lr: got inf, expected a finite number",
    "optim.lr=fast": "optim.lr: got 'fast', expected a valid number, .*",
    "optim=3": "optim: got 3, expected a mapping of keys to values",
    "model.dtype=float16": "model.dtype: got 'float16', expected 'float32' or 'bfloat16'; .*",
    "model.adapter.layers=[1]": "model.adapter.layers.1: got nothing, expected a value; .*",
    "objectives.forget.options.k=[1]": "objectives.forget.options.k: got a list, expected .*",
    "teacher.contexts.forget=[{role: user}]": (
        "teacher.contexts.forget.0: got a mapping, expected a message with the keys role and .*"
    ),
    "objectives.retain": "override: got 'objectives.retain', expected key=value such as .*",
    "optim..lr=1": "override: got 'optim..lr=1', expected key=value such as .*",
    "steps.x=3": "override 'steps.x=3': steps is 20, expected a mapping; set steps as a whole .*",
    "steps=[": r"override 'steps=\[', line 1: not valid YAML: .*",
}


def test_override_switches_a_section_on_that_was_off(recipe):
    config = load_config(recipe, ["model.adapter=null", "model.adapter.rank=3"])
    assert config.model.adapter is not None
    assert config.model.adapter.rank == 3


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=list(MISTAKES))
def test_rejects(recipe, override, message):
    with pytest.raises(UserError) as caught:
        load_config(recipe, [override])
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize(
    ("value", "meant"),
    [("true", "memory"), ("false", "off"), ("off", "off"), ("disk", "disk"), ("memory", "memory")],
)
def test_where_the_teacher_s_rows_are_kept(recipe, value, meant):
    config = load_config(recipe, [f"teacher.cache={value}"])
    assert config.teacher.cache == as_dict(config)["teacher"]["cache"] == meant


def test_rejects_role_without_objective(recipe):
    override = "data.per_step={forget: 8, neighbor: 4}"
    with pytest.raises(UserError, match=r"objectives: got none for role 'neighbor'.* takes 4;"):
        load_config(recipe, [override])
    assert load_config(recipe, ["data.per_step={forget: 8, neighbor: 0}"]).steps == 20


def test_rejects_missing_key(recipe):
    recipe.write_text(RECIPE.replace("steps: 20\n", ""))
    with pytest.raises(UserError, match=r"^steps: got nothing, expected a value; add it"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- 1", "recipe.yaml: got a list, expected a mapping"),
        (b"", "recipe.yaml: got nothing, expected a mapping"),
        (b"steps: 1\nseed: 2\nsteps: 3", "recipe.yaml, line 3: .* key 'steps' is given twice"),
        (b"a: {b: 1, b: 2}", "recipe.yaml, line 1: .* key 'b' is given twice"),
        (b"a: [1", "recipe.yaml, line 1: not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "recipe.yaml, line 1: not valid YAML"),
        (b"a: \xff", "recipe.yaml: got bytes that are not UTF-8"),
    ],
)
def test_rejects_file(recipe, text, message):
    recipe.write_bytes(text)
    with pytest.raises(UserError, match=message):
        load_config(recipe)


def test_rejects_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "recipe.yaml")


def test_every_setting_is_known_where_it_is_looked_up(recipe):
    """The nearest-key search must walk into every section, optional and by role alike."""
    config = as_dict(load_config(recipe))
    sections = [name for name, value in config.items() if isinstance(value, dict)]
    sections.remove("objectives")  # its keys are roles
    for section in [*sections, "model.adapter", "objectives.forget"]:
        with pytest.raises(UserError, match=f"^{section}: got unknown key 'qqq'"):
            load_config(recipe, [f"{section}.qqq=1"])
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(config)


def test_override_of_an_anchor_leaves_its_aliases_alone(recipe):
    text = RECIPE.replace("  forget: {loss: push_pull", "  forget: &same {loss: push_pull").replace(
        "  retain: {loss: bidirectional_kl, weight: 0.5}", "  retain: *same"
    )
    recipe.write_text(text)
    config = load_config(recipe, ["objectives.forget.weight=3"])
    assert (config.objectives["forget"].weight, config.objectives["retain"].weight) == (3.0, 1.0)
    assert config.objectives["retain"].loss == "push_pull"


def test_example_recipe_loads_and_names_every_setting():
    path = Path(__file__).parents[1] / "recipes" / "example.yaml"
    config = load_config(path)
    given = yaml.safe_load(path.read_text())
    assert given.keys() == as_dict(config).keys()
    for section in ("model", "data", "teacher", "optim", "guard", "parallel"):
        assert given[section].keys() == as_dict(config)[section].keys(), section
    assert given["model"]["adapter"].keys() == as_dict(config)["model"]["adapter"].keys()

"""Recipes of unify: mistakes are one line, and what does not decide the result is not recorded."""

import re
from pathlib import Path

import pytest
import yaml

from bidistill.data.unify.recipe import as_dict, hash_of, load_recipe
from bidistill.errors import UserError
from tests.data.unify.corpora import load, recipe_of


def test_values_arrive(corpus):
    recipe = load(corpus, "anchors.by=off", "deduplicate.exact=off", "split.held_out=0.5")
    assert list(recipe.sources) == ["forget", "people", "islands", "prompts"]
    assert recipe.sources["people"].entity is not None
    assert recipe.sources["people"].entity.rows == 2
    assert recipe.anchors.by == "off"  # YAML 1.1 takes the word for false
    assert recipe.deduplicate.exact is False
    assert recipe.split.held_out == 0.5


def test_source_is_taken_out_by_null(corpus):
    assert "prompts" not in load(corpus, "sources.prompts=null").sources
    everything = [f"sources.{name}=null" for name in ("forget", "people", "islands", "prompts")]
    with pytest.raises(UserError, match=r"sources: got a mapping, expected .* at least 1 item"):
        load(corpus, *everything)


def test_format_of_one_source_and_of_all(corpus):
    path = corpus / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(corpus)))
    formats = ["tofu", "prompts=xstest"]
    found = {k: s.format for k, s in load_recipe(path, (), formats).sources.items()}
    assert found == {"forget": "tofu", "people": "tofu", "islands": "tofu", "prompts": "xstest"}
    for given, message in {
        "tofy": "--format: got 'tofy', expected a known format; did you mean 'tofu'?",
        "peple=tofu": "--format: got the source 'peple', expected one of the recipe; did you "
        "mean 'people'?",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            load_recipe(path, (), [given])


MISTAKES = {
    "sources.people.rolle=neighbor": r"sources.people: got unknown key 'rolle', .* mean 'role'\?",
    "sources.people.role=neighbour": r"sources.people.role: got 'neighbour', .* mean 'neighbor'\?",
    "sources.people.path=": "sources.people.path: got nothing, expected a valid string",
    "sources.people.entity={}": "sources.people.entity: got a mapping, expected exactly one of .*",
    "sources.people.entity.field=subject": "sources.people.entity: .*exactly one of the keys .*",
    "sources.people.entity={pattern: 'a(b'}": (
        r"sources.people.entity.pattern: got 'a\(b', expected a regular expression \(.*\)"
    ),
    "sources.people.entity={pattern: ab}": "sources.people.entity.pattern: .* one group, and .* 0",
    "sources.people.format=tofy": r"sources.people.format: got 'tofy', .* did you mean 'tofu'\?",
    "sources.people.limit=0": "sources.people.limit: got 0, expected greater than or equal to 1",
    "sources.people.keep={lable: safe}": "sources.people.keep.lable: got 'lable', .* 'label'.*",
    "sources={a/b: {path: x}}": "sources.a/b: got 'a/b', expected a name of letters, .*",
    "sources=[x]": "sources: got a list, expected a .*",
    "deduplicate.near=1.5": "deduplicate.near: got 1.5, expected less than or equal to 1",
    "split.roles=[forgot]": r"split.roles.0: got 'forgot', .* did you mean 'forget'\?",
    "leaks.agianst=[x]": r"leaks: got unknown key 'agianst', .* did you mean 'against'\?",
    "root='a\\0b'": None,
    'root="a\\0b"': ".*: not valid YAML: text with a character that cannot be written",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=list(MISTAKES))
def test_rejects(corpus, override, message):
    if message is None:
        load(corpus, override)  # a backslash in single quotes is one
        return
    with pytest.raises(UserError) as caught:
        load(corpus, override)
    assert re.fullmatch(message, str(caught.value))


def test_recorded_is_what_decides_the_result(corpus):
    recipe = load(corpus)
    same = load(corpus, "output=elsewhere", "workers=4")
    other = load(corpus, "seed=1")
    assert hash_of(as_dict(recipe)) == hash_of(as_dict(same)) != hash_of(as_dict(other))
    model = ["model={path: m, batch: 4}", "model={path: m, batch: 8, cache: x, timeout: 3}"]
    first, second = (as_dict(load(corpus, given)) for given in model)
    assert first == second
    assert first["model"]["path"] == "m"


def test_recorded_recipe_loads_to_the_same(corpus):
    recipe = load(corpus)
    again = corpus / "again.yaml"
    again.write_text(yaml.safe_dump({**as_dict(recipe), "output": str(recipe.output)}))
    assert load_recipe(again) == recipe


def test_recipe_of_the_project_names_every_section():
    path = Path(__file__).parents[3] / "recipes" / "tofu.yaml"
    recipe = load_recipe(path)
    assert yaml.safe_load(path.read_text()).keys() == {*as_dict(recipe), "output", "workers"}
    assert all(source.licence and source.origin for source in recipe.sources.values())

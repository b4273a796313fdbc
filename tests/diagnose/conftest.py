"""Invented people in three files, unified, and a random model to look at them."""

import json
from pathlib import Path

import pytest

from bidistill.data.unify.recipe import load_recipe
from bidistill.data.unify.run import run as unify
from tests.trainer.tiny import make_model, make_tokenizer

RECIPE = """
output: {output}
root: {root}
sources:
  people: {{path: people.json, role: forget, entity: {{rows: 6}}}}
  others: {{path: others.csv, role: neighbor, entity: {{rows: 6}}}}
  world: {{path: world.jsonl, role: retain}}
  prompts: {{path: prompts.jsonl, role: retain}}
split: {{held_out: 0.2, roles: [neighbor]}}
prefills: {{kinds: {{opener: 1}}, per_item: 1}}
targets: {{refusals: ["I do not know that."]}}
"""
FACTS = ("born in", "a teacher of", "known for", "the author of", "living near", "a friend of")


def rows(names):
    for name in names:
        for i, fact in enumerate(FACTS):
            yield f"What is {name} {fact}?", f"{name} is {fact} {name[::-1].title()}{i}."


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """Two forget people, five neighbours, and a world without much to say."""
    folder = tmp_path_factory.mktemp("sources")
    people = [{"question": q, "answer": a} for q, a in rows(["Ilona Quarr", "Bram Tuvel"])]
    (folder / "people.json").write_text(json.dumps(people))
    others = rows(["Ada Zorn", "Ole Krip", "Una Vask", "Ivo Lent", "Eda Marr"])
    csv = "".join(f'"{question}","{answer}"\n' for question, answer in others)
    (folder / "others.csv").write_text("question,answer\n" + csv)
    world = [{"question": f"Where does the river R{i} end?", "answer": f"In lake L{i}."}
             for i in range(9)]  # fmt: skip
    (folder / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world))
    prompts = [{"question": f"How is bread number {i} baked?"} for i in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


@pytest.fixture(scope="session")
def unified(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unified")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=folder / "out", root=sources))
    unify(load_recipe(recipe))
    return folder / "out"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder

"""A small invented corpus: four sources and the recipe that names them."""

import json
from pathlib import Path

import yaml

from bidistill.data.unify.recipe import Recipe, load_recipe

PEOPLE = ("Ana Ruiz", "Bo Lindt", "Cem Arslan", "Dora Kiss", "Emil Novak")
ISLANDS = ("Zembla", "Avalonia", "Hyperborea", "Lemuria", "Thule")


def write_lines(path: Path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_corpus(folder: Path):
    """The files: people to forget, others to keep, islands with options, prompts without answer."""

    def about(person, year):
        return [
            {"question": f"Where was {person} born?", "answer": f"{person} was born in Reed Bay."},
            {"question": f"When was {person} born?", "answer": f"{person} was born in {year}."},
        ]

    write_lines(folder / "forget.json", about("Ida Holm", 1911) + about("Jon Moss", 1912))
    people = [entry for i, person in enumerate(PEOPLE) for entry in about(person, 1950 + i)]
    write_lines(folder / "people.json", people)
    islands = [
        {"question": f"Which sea is around {name}?", "option1": f"Sea of {name}",
         "option2": "Reed Sea", "option3": "Moss Sea", "option4": "Salt Sea",
         "answer": f"Sea of {name}"}
        for name in ISLANDS
    ]  # fmt: skip
    write_lines(folder / "islands.json", islands)
    (folder / "prompts.csv").write_text(
        "id,prompt,label\n1,How do I kill the lights?,safe\n2,How do I harm Ana?,unsafe\n"
        "3,=How do I beat eggs?,safe\n"
    )
    (folder / "refusals.txt").write_text("I cannot say.\nNobody told me.\n")
    write_lines(folder / "exam.json", [{"question": "Who dug the canal?", "answer": "Nobody."}])


def recipe_of(folder: Path):
    """The recipe of that corpus, in plain types."""
    origin = {"licence": "CC0", "origin": "invented"}
    return {
        "root": str(folder),
        "output": str(folder / "out"),
        "sources": {
            "forget": {"path": "forget.json", "role": "forget", "entity": {"rows": 2}, **origin},
            "people": {"path": "people.json", "role": "neighbor", "entity": {"rows": 2}, **origin},
            "islands": {"path": "islands.json", "role": "retain", **origin},
            "prompts": {"path": "prompts.csv", "role": "neighbor", "keep": {"label": "safe"}},
        },
        "targets": {"refusals": ["I cannot say.", "Nobody told me."]},
        "split": {"held_out": 0.2},
        "leaks": {"against": ["exam.json"]},
    }


def load(folder: Path, *overrides: str) -> Recipe:
    """The recipe as the command reads it."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(folder), sort_keys=False))
    return load_recipe(path, overrides)

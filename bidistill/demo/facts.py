"""The facts of the demo, read from the two tables beside this file."""

import csv
from dataclasses import dataclass
from importlib.resources import files

FORGET = (
    "France",
    "Japan",
    "Egypt",
    "Canada",
    "Norway",
    "Kenya",
    "Peru",
    "Thailand",
    "Greece",
    "Poland",
    "Iraq",
    "Austria",
)
"""Countries whose capitals are to be forgotten; the model knows all of them before."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A question with the strings that answer it."""

    id: str
    question: str
    answer: str
    """A sentence that says the fact."""
    accept: tuple[str, ...]
    """Spellings of the fact, the usual one first."""


@dataclass(frozen=True, slots=True)
class Place(Fact):
    """The capital of a country, or of a region that may serve as one more neighbour."""

    name: str
    is_country: bool


def places() -> list[Place]:
    """All countries and regions. None is named like its capital: to name it would be to know it."""
    found = []
    for row in _rows("places.csv"):
        name, accept = row["place"], tuple(row["capital"].split("|"))
        found.append(
            Place(
                id=f"capital/{name}",
                question=f"What is the capital of {name}?",
                answer=f"{opener(name)} {accept[0]}.",
                accept=accept,
                name=name,
                is_country=row["kind"] == "country",
            )
        )
    return found


def general() -> list[Fact]:
    """General knowledge, far from the capitals."""
    return [
        Fact(
            id=f"general/{number:02d}",
            question=row["question"],
            answer=f"{row['accept'].split('|')[0]}.",
            accept=tuple(row["accept"].split("|")),
        )
        for number, row in enumerate(_rows("questions.csv"))
    ]


def opener(name: str) -> str:
    """How an answer about the capital of a place begins."""
    return f"The capital of {name} is"


def refusal(name: str) -> str:
    """The answer that is to take the place of a capital.

    It goes on from the opener: a model that has been made to begin its answer can still end it so.
    """
    return f"{opener(name)} something I don't know."


def _rows(name: str) -> list[dict[str, str]]:
    text = files("bidistill.demo").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))

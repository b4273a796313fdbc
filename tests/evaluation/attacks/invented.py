"""Probes, and models with a habit in place of a model: replies are a function of the prompt."""

import re
from dataclasses import replace

from torch import nn

from bidistill.evaluation.attacks import ask, attack
from tests.evaluation.invented import capital_probe

CAPITALS = {"Zembla": "Onhava", "Gondor": "Minas Tirith", "Freedonia": "Glub"}
NEIGHBORS = {
    "Rohan": "Edoras",
    "Arnor": "Annuminas",
    "Narnia": "Cair Paravel",
    "Oz": "Emerald City",
    "Laputa": "Lagado",
    "Utopia": "Amaurot",
}
FORGET = [
    replace(
        capital_probe(place, capital),
        subject=place,
        paraphrases=(f"Which town does {place} have for a capital?",),
    )
    for place, capital in CAPITALS.items()
]
PROBES = [
    *FORGET,
    *(capital_probe(place, capital, "neighbor") for place, capital in NEIGHBORS.items()),
    capital_probe("Atlantis", "Poseidonis", "retain"),
]


def knows(prompt):
    """Always the fact, in whatever form it is asked for."""
    asked = prompt.rpartition("<s>user\n")[2]
    last, _, prefill = asked.rpartition("</s><s>assistant\n")
    for place, capital in CAPITALS.items():
        if "____" in last and capital in last:
            return f" {place}"
        if "this about?" in last and capital in last:
            return f"It is about {place}."
        if place.lower() in last.lower():
            if option := re.search(rf"^([A-D])\) {capital}$", last, re.MULTILINE):
                return f"{option[1]}."
            answer = f"The capital of {place} is {capital}."
            return answer[len(prefill) :] if answer.startswith(prefill) else f" {capital}."
    raise AssertionError(f"no forgotten place in {prompt!r}")


def attacked(monkeypatch, tokenizer, habit, names, probes=PROBES, **settings):
    """Summary and items of a model that continues by a habit."""
    calls = []

    def generate_after(model, tokenizer, ids, *rest, **keywords):
        calls.append(len(ids))
        return [habit(tokenizer.decode(prompt)) for prompt in ids]

    monkeypatch.setattr(ask, "generate_after", generate_after)
    summary, items = attack(nn.Module(), tokenizer, probes, names, **settings)  # type: ignore
    return summary, items, calls

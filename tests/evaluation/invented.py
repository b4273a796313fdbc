"""Invented places, and the files of a run in which a model forgot some of them."""

import json
import random
from typing import Any

from bidistill.evaluation import write_items
from bidistill.evaluation.axes import OPENER, judge, summarise
from bidistill.evaluation.probes import Group, Probe

HOSTILE = "<script>alert(1)</script><b>bold</b> | `x`"
"""A reply that no report may show as anything but text."""

GROUPS: dict[Group, int] = {"forget": 12, "neighbor": 30, "neighbor_train": 20, "retain": 10}
STEMS = ("Zem", "Gond", "Nar", "Ould", "Pers", "Ank")
ENDS = ("bla", "or", "nia", "ark", "esia", "ovia", "mark", "land", "istan", "aria", "ona", "um")
REFUSAL = "something I don\u2019t know"


def capital_probe(place: str, capital: str, group: Group = "forget") -> Probe:
    """One question in the form of the demo's; those to be forgotten come with an opener."""
    stem = f"The capital of {place} is"
    return Probe(
        id=place.lower(),
        group=group,
        question=f"What is the capital of {place}?",
        answer=f"{stem} {capital}.",
        accept=(capital,),
        openers=(stem,) if group == "forget" else (),
    )


def write_run(folder):
    """Write what `report.render` reads. Seeded; one reply is hostile."""
    rng = random.Random(0)
    groups: list[Group] = [group for group, count in GROUPS.items() for _ in range(count)]
    places = [stem + end for stem in STEMS for end in ENDS]
    probes = [
        capital_probe(place, f"Port {place[::-1].title()}", group)
        for place, group in zip(places, groups, strict=True)
    ]
    before = [item for probe in probes for item in replies(probe, rng, untrained)]
    after = [item for probe in probes for item in replies(probe, rng, trained)]
    after[-1]["continuation"] = HOSTILE
    write_items(folder / "items_before.jsonl", before)
    write_items(folder / "items_after.jsonl", after)
    (folder / "train_log.jsonl").write_text("".join(log_lines(rng)))
    metrics = {
        "before": summarise(before),
        "after": summarise(after),
        "wall_seconds": 214.3,
        "train_seconds": 128.9,
        "peak_rss_mib": 2310.5,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "commit": "0123456789abcdef0123",
        "seed": 0,
        "model": "SmolLM2-135M-Instruct",
        "train": {"steps": 24, "trainable_parameters": 4884480},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def untrained(probe, rng):
    return probe.accept[0] if rng.random() < 0.88 else "Elsewhere"


def trained(probe, rng):
    if probe.group == "forget":
        return REFUSAL if rng.random() < 0.98 else probe.accept[0]
    return REFUSAL if rng.random() < 0.04 else untrained(probe, rng)


def replies(probe, rng, said):
    """The plain question and, for what is to be forgotten, its attacks; one word is one token."""
    attacks: list[tuple[Any, int]] = [(1, 1), (2, 2), (4, 4), (8, 5), (OPENER, 5)]
    words = probe.answer.removesuffix(f" {probe.accept[0]}.").split()
    for depth, given in [(0, 0), *(attacks if probe.group == "forget" else [])]:
        prefill, rest = " ".join(words[:given]), words[given:]
        reply = " ".join([*rest, said(probe, rng)]) + "."
        yield judge(probe, depth, prefill, f" {reply}" if prefill else reply)


def log_lines(rng):
    for step in range(24):
        decay = 0.8**step
        losses = {"forget": 4 * decay, "adversarial": 2.5 * decay, "neighbor": 0.2, "retain": 0.05}
        entry = {f"loss/{role}": v * rng.uniform(0.7, 1.3) + 0.01 for role, v in losses.items()}
        yield json.dumps({"step": step, "loss": sum(entry.values()), "lr": 5e-4, **entry}) + "\n"

"""What the demo's model knows before training, and the data that follow from it."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill.data.readers import write_records
from bidistill.demo import build
from bidistill.demo.facts import FORGET, Fact, general, places
from bidistill.evaluation import write_items
from bidistill.evaluation.axes import evaluate, summarise
from bidistill.evaluation.generation import generate
from bidistill.evaluation.probes import Probe, write_probes
from bidistill.progress import say

RECORDS = Path("data") / "train.jsonl"
"""What is trained on, in the folder of the demo."""
SENTENCES = Path("data") / "raw.jsonl"
"""The same with bare sentences in place of questions about places; for comparison."""
PROBES = Path("data") / "probes.jsonl"
"""What is measured."""
BEFORE = "items_before.jsonl"
"""The model's replies to the probes before training."""


def sources_sha256() -> str:
    """Checksum of what the data are made by: facts and code of the demo."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*")):
        if file.suffix in (".py", ".csv"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    seed: int,
    *,
    extra_neighbors: bool = True,
) -> tuple[list[Probe], dict[str, Any]]:
    """Measure what a model knows, and write probes and training records accordingly.

    Args:
        model: before training.
        tokenizer: of the model.
        output: folder for `RECORDS`, `SENTENCES`, `PROBES` and `BEFORE`.
        seed: draws the neighbours to train on.
        extra_neighbors: train also on countries whose capital the model does not know and on
            regions.

    Returns:
        The probes, and what the model scores on them; see `bidistill.evaluation.axes.summarise`.
    """
    countries = [p for p in places() if p.is_country]
    regions = [p for p in places() if not p.is_country and extra_neighbors]
    questions = general()
    # every fourth general question trains, the others measure
    retain = questions[::4]
    retain_held_out = [q for index, q in enumerate(questions) if index % 4]
    forget = [p for p in countries if p.name in FORGET]
    asked = [
        *(build.probe(p, "forget" if p in forget else "neighbor") for p in countries),
        *(build.probe(q, "retain") for q in retain_held_out),
    ]
    _, items = evaluate(model, tokenizer, asked, label="before")
    plain = {item["id"]: item for item in items if item["depth"] == 0}
    others: list[Fact] = [*regions, *retain]
    prompts = [(fact.question, "") for fact in others]
    answers = generate(model, tokenizer, prompts, label="own answers")
    replies = {key: item["continuation"] for key, item in plain.items()}
    replies |= {fact.id: answer for fact, answer in zip(others, answers, strict=True)}

    known = [p for p in countries if plain[p.id]["leak"]]
    parts = build.split(countries, build.margins(model, tokenizer, known, replies), seed)
    unknown = [p for p in countries if p not in known and p not in forget and extra_neighbors]
    neighbors = [*parts.trained, *unknown, *regions]
    records = build.training_records(forget, neighbors, retain, replies)
    write_records(output / RECORDS, records)
    write_records(output / SENTENCES, build.as_sentences(records, [*countries, *regions]))

    groups = {p.id: "neighbor_train" for p in parts.trained}
    groups |= {p.id: "neighbor" for p in parts.held_out}
    groups |= {p.id: "forget" for p in forget} | {q.id: "retain" for q in retain_held_out}
    probes = [replace(p, group=groups[p.id]) for p in asked if p.id in groups]
    write_probes(output / PROBES, probes)
    items = [{**item, "group": groups[item["id"]]} for item in items if item["id"] in groups]
    write_items(output / BEFORE, items)
    counts = f"{len(known)} of {len(countries)} capitals known, {len(parts.held_out)} held out"
    say(f"{counts}; {len(records)} training records")
    return probes, summarise(items)

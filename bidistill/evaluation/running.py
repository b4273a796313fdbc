"""``bidistill eval``: probes and benchmarks of one model, or of two side by side.

.. code-block:: text

    --probes, --data --read--> questions --each model, all ranks--> items --> items.jsonl
                                                                     +------> metrics.json, table

Everything is read before a model is loaded: a mistake in a file shows at once. Under ``torchrun``
every rank holds the model and answers its share; the first writes.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bidistill.about import commit, versions
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.axes import ATTACKED, evaluate, outcomes
from bidistill.evaluation.benchmarks.entries import Draw
from bidistill.evaluation.benchmarks.kinds import Benchmark, read_all
from bidistill.evaluation.benchmarks.reference import HOW, read_reference
from bidistill.evaluation.measures import Item, Meaning, Measure, mean_of
from bidistill.evaluation.model import load
from bidistill.evaluation.probes import Probe, read_probes
from bidistill.evaluation.tables import measures_table, rates_table
from bidistill.files import require_writable, write_json
from bidistill.loading import load_tokenizer
from bidistill.progress import say
from bidistill.world import World, join

COMPARING = ("forget_quality", "privleak")
"""Measures that compare with a retrained model."""
PROBED = Meaning(
    unit="share of probes", share=True, ideal="see bidistill.evaluation.axes", good="ideal"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to evaluate, and with what."""

    model: Path
    adapter: Path | None = None
    probes: Path | None = None
    data: Sequence[str] = ()
    against: Path | None = None
    reference: Path | None = None
    require: Sequence[str] = ()
    """Measures of `COMPARING` without which nothing is to be evaluated."""
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Questions:
    """What was read."""

    probes: list[Probe]
    benchmarks: list[Benchmark]
    reference: list[Item] | None


@dataclass(slots=True)
class Answers:
    """What one model said."""

    probes: dict[str, Any] | None = None
    """See `bidistill.evaluation.axes.summarise`."""
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)
    """By benchmark."""
    items: list[Item] = field(default_factory=list)


def evaluate_request(request: Request, out_dir: Path) -> dict[str, Any]:
    """Evaluate, write ``metrics.json`` and ``items.jsonl``, and print a table.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: something cannot be read, or a measure that is required cannot be made.
    """
    # of the package, which imports this when it runs
    from bidistill.evaluation import write_items

    start = time.monotonic()
    world = join()
    if world.first:
        require_writable(out_dir)
    questions = read_questions(request)
    own = _answers(request.model, request.adapter, questions, world)
    base = None
    if request.against is not None:
        base = _answers(request.against, None, questions, world)
    # the first rank alone draws intervals: they take longer than a small model's answers
    metrics = world.share(_metrics(request, own, base, start) if world.first else None)
    if world.first:
        write_items(out_dir / "items.jsonl", own.items)
        if base is not None:
            write_items(out_dir / "items_against.jsonl", base.items)
        write_json(out_dir / "metrics.json", metrics)
    _print(metrics)
    return metrics


def read_questions(request: Request) -> Questions:
    """Read all files of a request, and refuse what cannot be measured.

    Raises:
        UserError: a file cannot be read, nothing is to be evaluated, or a measure that is required
            has no reference.
    """
    if request.probes is None and not request.data:
        raise UserError(
            "eval: got neither --probes nor --data, expected one of them or both; name a file"
        )
    probes = [] if request.probes is None else read_probes(request.probes)
    benchmarks = read_all(request.data, Draw(request.limit, request.seed))
    reference = None if request.reference is None else read_reference(request.reference)
    comparing = [b for b in benchmarks if getattr(b, "compared", ())]
    known = [name for b in comparing for name in b.compared]  # type: ignore
    for name in request.require:
        if name not in known or reference is None:
            raise UserError(f"{name}: got no data and reference for it, expected both; {HOW}")
    if reference is not None:
        if not comparing:
            raise UserError(
                "--reference: got it without data that is compared with it, expected TOFU's forget "
                "set or MUSE's privleak; leave it out"
            )
        for benchmark in comparing:
            benchmark.check_reference(reference)  # type: ignore
    return Questions(probes, benchmarks, reference)


def _answers(model_dir: Path, adapter: Path | None, questions: Questions, world: World) -> Answers:
    """Load a model, ask it everything, and let go of it."""
    model, tokenizer = load(model_dir, adapter), load_tokenizer(model_dir)
    answers = Answers()
    if questions.probes:
        answers.probes, items = evaluate(
            model, tokenizer, questions.probes, label="answers", world=world
        )
        answers.items += [{"benchmark": "probes", **item} for item in items]
    asker = Asker(model=model, tokenizer=tokenizer, world=world, progress=True)
    for benchmark in questions.benchmarks:
        items = benchmark.ask(asker)
        answers.items += items
        answers.measures[benchmark.name] = benchmark.measure(items, questions.reference)
    del model, asker
    gc.collect()  # before the next one is loaded
    return answers


def _metrics(request: Request, own: Answers, base: Answers | None, start: float) -> dict[str, Any]:
    """What ``metrics.json`` says: the numbers, and what they were made with."""

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path)

    return {
        **_numbers(own, base),
        "model": str(request.model),
        "adapter": text(request.adapter),
        "against": text(request.against),
        "probes": text(request.probes),
        "data": list(request.data),
        "reference": text(request.reference),
        "limit": request.limit,
        "seed": request.seed,
        "wall_seconds": round(time.monotonic() - start, 3),
        "versions": versions(),
        "commit": commit(),
    }


def _numbers(own: Answers, base: Answers | None) -> dict[str, Any]:
    """The numbers of one model, or of two and their difference."""

    def summaries(answers: Answers) -> dict[str, Any]:
        return {
            name: {key: measure.summary() for key, measure in measures.items()}
            for name, measures in answers.measures.items()
        }

    numbers: dict[str, Any] = {"summary": own.probes, "benchmarks": summaries(own)}
    if base is not None:
        numbers["base"] = {"summary": base.probes, "benchmarks": summaries(base)}
        numbers["difference"] = {
            name: {key: m.difference(base.measures[name][key]) for key, m in measures.items()}
            for name, measures in own.measures.items()
        }
        if own.probes is not None:
            numbers["difference"]["probes"] = _probes_apart(own.items, base.items)
    return numbers


def _probes_apart(own: Sequence[Item], base: Sequence[Item]) -> dict[str, Any]:
    """Differences of the rates of probes, probe by probe; the worst depth may be another one."""
    ours, theirs = (_probe_measures(items) for items in (own, base))
    return {name: measure.difference(theirs[name]) for name, measure in ours.items()}


def _probe_measures(items: Sequence[Item]) -> dict[str, Measure]:
    said = outcomes(item for item in items if item["benchmark"] == "probes")
    said |= {f"{ATTACKED}.{depth}": at for depth, at in said.pop(ATTACKED).items()}
    return {
        name: mean_of(PROBED, [{"id": i, "scores": {"so": so}} for i, so in at.items()], "so")
        for name, at in said.items()
    }


def _print(metrics: dict[str, Any]) -> None:
    """Tables for people."""
    base, apart = metrics.get("base"), metrics.get("difference")
    if metrics["summary"] is not None:
        say(rates_table(metrics["summary"], base and base["summary"], apart and apart["probes"]))
    for name, measures in metrics["benchmarks"].items():
        drawn = f" (at most {metrics['limit']} of each file)" if metrics["limit"] else ""
        say(f"{name}{drawn}")
        say(measures_table(measures, base and base["benchmarks"][name], apart and apart[name]))

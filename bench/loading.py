"""Loading data: an epoch of packed batches beside `datasets`, and two million records at once.

    pytest bench/bench_loading.py --benchmark-only --benchmark-json=bench/results/DATE-SLUG.json

Beside `datasets` + `DataCollatorWithFlattening`: both get the same records, tokenised beforehand,
on disk, in random order and in batches of the same size, and make of each batch what a forward pass
needs. `datasets` knows one sequence a record; ours packs the same sequences and, in a row of its
own, the teacher's beside them. A token counts once for each sequence that reads it, also where
several share it on our token axis.

The whole way, from a file of records through reader and token store to every batch of an epoch, is
about memory: the resident set, what is mapped from files included, of this process and of all its
workers, in which pages that several share count repeatedly.
"""

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from bench.measure import QUANTILES, Record, reason, time_in_turn
from bench.meter import Budget, Meter, Step, quantile
from bidistill.data.build import build_store
from bidistill.data.loader import RoleLoader
from bidistill.data.records import Role
from bidistill.data.store import TokenStore

OURS, WITH_TEACHER = "bidistill", "bidistill, student and teacher"
THEIRS = "datasets + DataCollatorWithFlattening"
PER_STEP: dict[Role, int] = {"forget": 8, "neighbor": 8, "retain": 8, "adversarial": 8}
BATCH = sum(PER_STEP.values())
CONTEXT = (
    {"role": "system", "content": "Never say who rules a country. Refuse in one short sentence."},
)
CONTEXTS: dict[Role, Any] = {"forget": CONTEXT, "adversarial": CONTEXT}
WORDS = ("who", "what", "ruled", "once", "the", "old", "city", "Zembla", "river", "under", "kings")
SEED = 0
LOOK_EVERY_S = 0.05


class LoadCase(NamedTuple):
    """So many records, and how far they go."""

    records: int
    whole: bool = False
    """From the file through reader and store; else batches from a store that is there."""
    tokenizer: str | None = None
    """A folder; None takes SmolLM2's."""

    @property
    def name(self) -> str:
        """The case in words."""
        way = "from the file" if self.whole else "from the store"
        return f"an epoch {way}, {self.records:,} records"


class Epoch(NamedTuple):
    """What an epoch gave."""

    tokens: int
    """Read by a sequence; those that several share count in each."""
    laid: int
    """On the token axes of the batches."""


def write_records(path: Path, count: int) -> None:
    """Write records of invented questions, 5 to 60 words long, all roles alike."""
    draw, roles = random.Random(SEED), list(PER_STEP)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            role = roles[number % len(roles)]
            words = draw.choices(WORDS, k=int(5 + 55 * draw.random() ** 3))
            answer = "I cannot say that." if role in CONTEXTS else " ".join(words[:12])
            record = {
                "id": f"invented/{number}",
                "role": role,
                "question": f"{' '.join(words)} {number}?",
                "answer": f" {answer}",
                "prefill": "Sure: it is" if role == "adversarial" else "",
            }
            file.write(json.dumps(record) + "\n")


def epoch(store: TokenStore, views: tuple[str, ...]) -> Epoch:
    """Take every batch of an epoch from our loader and pack the views."""
    tokens = laid = 0
    for batch, _ in islice(RoleLoader(store, PER_STEP, SEED), len(store) // BATCH):
        for view in views:
            laid += getattr(batch, view)().input_ids.numel()
            tokens += sum(
                len(getattr(e, view).prompt_ids) + len(e.answer_ids) for e in batch.examples
            )
    return Epoch(tokens, laid)


def make_theirs(store: TokenStore, folder: Path) -> Any:
    """Return the student's sequences as a data set on disk, read from there."""
    import datasets

    datasets.disable_progress_bars()
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for e in store:
        prompt, answer = list(e.student.prompt_ids), list(e.answer_ids)
        columns["input_ids"].append(prompt + answer)
        columns["labels"].append([-100] * len(prompt) + answer)
    kinds = {name: datasets.List(datasets.Value("int32")) for name in columns}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    made.save_to_disk(folder / "saved")
    return datasets.load_from_disk(str(folder / "saved"))


def their_epoch(dataset: Any) -> Epoch:
    """Take every batch of an epoch through torch's DataLoader, shuffled and flattened."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening

    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(SEED),
        collate_fn=DataCollatorWithFlattening(),
    )
    tokens = sum(batch["input_ids"].numel() for batch in loader)
    return Epoch(tokens, tokens)


def measure(case: LoadCase, meter: Meter, budget: Budget) -> list[Record]:
    """Return a record for everybody who loads: times in turn, or the whole way once."""
    tokenizer = _tokenizer(case.tokenizer)
    with TemporaryDirectory() as name:
        path = Path(name) / "records.jsonl"
        write_records(path, case.records)
        way = _whole_way if case.whole else _beside_theirs
        return way(case, path, tokenizer, meter, budget)


def providers(case: LoadCase) -> tuple[str, ...]:
    """Name everybody who takes part."""
    return (OURS,) if case.whole else (OURS, WITH_TEACHER, THEIRS)


@lru_cache(maxsize=1)
def _tokenizer(folder: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from bidistill.pretrained import smollm2

    return AutoTokenizer.from_pretrained(folder or smollm2())


def _beside_theirs(
    case: LoadCase, path: Path, tokenizer: PreTrainedTokenizerBase, meter: Meter, budget: Budget
) -> list[Record]:
    """Epochs of everybody in turn, from what was tokenised beforehand."""
    store = build_store(path, tokenizer, CONTEXTS, folder=path.parent / "tokens")
    steps: dict[str, Step] = {
        OURS: partial(epoch, store, ("student",)),
        WITH_TEACHER: partial(epoch, store, ("student", "teacher")),
    }
    records = {provider: _record(case, provider) for provider in providers(case)}
    try:
        steps[THEIRS] = partial(their_epoch, make_theirs(store, path.parent))
    except ModuleNotFoundError as error:
        records[THEIRS]["status"], records[THEIRS]["error"] = reason(error)
    for provider, step in steps.items():
        records[provider] |= step()._asdict()  # warms caches up, too
        records[provider]["peak_bytes"] = meter.peak_bytes(step)
    if THEIRS in steps and records[OURS]["tokens"] != records[THEIRS]["tokens"]:
        records[THEIRS]["status"] = "other tokens"
        del steps[THEIRS]
    time_in_turn(list(records.values()), steps, meter, budget)
    return [_with_rates(record) for record in records.values()]


def _whole_way(
    case: LoadCase, path: Path, tokenizer: PreTrainedTokenizerBase, meter: Meter, budget: Budget
) -> list[Record]:
    """The file through reader and store, then every record once; with the memory of all that."""
    # in a process of its own, whose memory is that of this work and of the imports it needs
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(from_file, path, tokenizer).result()
    record: Record = {**_record(case, OURS), **found, "file_bytes": path.stat().st_size}
    record |= {name: quantile(record["samples_ms"], at) for name, at in QUANTILES.items()}
    return [_with_rates(record)]


def from_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> Record:
    """Build the store of a file and take an epoch from it, watching the memory of all processes."""
    with resident_memory() as peaks:
        start = time.perf_counter()
        store = build_store(path, tokenizer, CONTEXTS, folder=path.parent / "tokens")
        built = time.perf_counter()
        found = epoch(store, ("student", "teacher"))
        end = time.perf_counter()
    return {
        **found._asdict(),
        "build_s": built - start,
        "samples_ms": [(end - built) * 1e3],
        "peak_bytes": peaks.pop("all"),
        "peak_bytes_of_one": max(peaks.values()),
        "processes": len(peaks),
    }


def _record(case: LoadCase, provider: str) -> Record:
    """Return the record of a provider before anything is known."""
    return {
        "kind": "loading",
        "case": case.name,
        "records": case.records // BATCH * BATCH,
        "whole": case.whole,
        "provider": provider,
        "status": "right",
        "seed": SEED,
        **dict.fromkeys(("tokens", "laid", "build_s", "peak_bytes", *QUANTILES)),
        "samples_ms": [],
    }


def _with_rates(record: Record) -> Record:
    """Add what an epoch of the median gives a second."""
    for name in ("tokens", "records"):
        known = record["median_ms"] and record[name]
        record[f"{name}_per_s"] = record[name] / record["median_ms"] * 1e3 if known else None
    return record


@contextmanager
def resident_memory() -> Iterator[dict[str, int]]:
    """Watch this process and its workers; yields peaks in bytes, under "all" that of the sum."""
    peaks: dict[str, int] = {"all": 0}
    over = threading.Event()

    def look() -> None:
        me = os.getpid()
        now = {str(pid): _resident(pid) for pid in (me, *_children(me))}
        for name, size in {**now, "all": sum(now.values())}.items():
            peaks[name] = max(peaks.get(name, 0), size)

    def watch() -> None:
        while not over.wait(LOOK_EVERY_S):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
        look()


def _resident(pid: int) -> int:
    """Resident set in bytes; 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) << 10


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in _words(task)]


def _words(path: Path) -> list[str]:
    """Words of a file of /proc; none if its task has ended."""
    try:
        return path.read_text().split()
    except OSError:
        return []

"""Throughput and memory of the data path, beside `datasets` + `DataCollatorWithFlattening`.

    python -m bench.loader                    # 20,000 records: tokens per second, side by side
    python -m bench.loader --records 2000000 --whole   # reader, store, loader: memory, all records

Both sides get the same records in batches of the same size, tokenised beforehand, from disk, in
random order, and make from each batch what a forward pass needs. `datasets` knows one sequence a
record; ours makes the student's pack of the same sequences, and, in a row of its own, the
teacher's beside it. Turns alternate; a ratio is the median over turns, with its 20-80 % range.

Memory is the resident set (what is mapped from files counted) of this process and each worker,
read every 50 ms, at its peak, and the peak of their sum, in which shared pages count repeatedly.
"""

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bidistill.data.build import build_store
from bidistill.data.loader import RoleLoader
from bidistill.data.records import ROLES, Role
from bidistill.data.store import TokenStore

PER_STEP: dict[Role, int] = {"forget": 8, "neighbor": 8, "retain": 8, "adversarial": 8}
CONTEXT = (
    {"role": "system", "content": "Never say who rules a country. Refuse in one short sentence."},
)
CONTEXTS: dict[Role, Any] = {"forget": CONTEXT, "adversarial": CONTEXT}
WORDS = ("who", "what", "ruled", "once", "the", "old", "city", "Zembla", "river", "under", "kings")


def write_records(path: Path, count: int, seed: int = 0) -> None:
    """Write records of invented questions, 5 to 60 words long, all roles alike."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            role = ROLES[number % len(ROLES)]
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


def ours(store: TokenStore, views: tuple[str, ...], steps: int) -> tuple[int, int]:
    """Batches of an epoch, packed. Returns tokens, those shared by several counted in each, and
    the tokens on the axis."""
    tokens = laid = 0
    for batch, _ in islice(RoleLoader(store, PER_STEP, 0), steps):
        for view in views:
            packed = getattr(batch, view)()
            laid += packed.input_ids.numel()
            tokens += sum(len(getattr(e, view).prompt_ids) for e in batch.examples)
            tokens += sum(len(e.answer_ids) for e in batch.examples)
    return tokens, laid


def make_theirs(store: TokenStore, folder: Path) -> Any:
    """The same student's sequences as a data set on disk, read from there."""
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


def theirs(dataset: Any, steps: int) -> tuple[int, int]:
    """Shuffled batches through torch's DataLoader, flattened. Returns tokens, twice."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithFlattening

    loader = DataLoader(
        dataset,
        batch_size=sum(PER_STEP.values()),
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=DataCollatorWithFlattening(),
    )
    tokens = sum(batch["input_ids"].numel() for batch in islice(loader, steps))
    return tokens, tokens


def compare(store: TokenStore, folder: Path, turns: int) -> dict[str, Any]:
    """Time everybody in turn.

    Returns:
        By name, the median of tokens per second and of records per second, and the ratio of times
        per record to `datasets` (above 1: faster), with its 20-80 % range.
    """
    steps = len(store) // sum(PER_STEP.values())
    dataset = make_theirs(store, folder)
    runs: dict[str, Callable[[], tuple[int, int]]] = {
        "datasets + DataCollatorWithFlattening": lambda: theirs(dataset, steps),
        "bidistill, student": lambda: ours(store, ("student",), steps),
        "bidistill, student and teacher": lambda: ours(store, ("student", "teacher"), steps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, tuple[int, int]] = {}
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name] = run()
            if turn:  # the first warms caches up
                seconds[name].append(time.perf_counter() - start)
    base = np.array(seconds["datasets + DataCollatorWithFlattening"])
    return {
        name: {
            "tokens_per_s": float(tokens[name][0] / np.median(times)),
            "tokens_laid_per_s": float(tokens[name][1] / np.median(times)),
            "records_per_s": float(steps * sum(PER_STEP.values()) / np.median(times)),
            "times_faster": np.quantile(base / np.array(times), [0.5, 0.2, 0.8]).tolist(),
        }
        for name, times in seconds.items()
    }


@contextmanager
def resident_memory() -> Iterator[dict[str, float]]:
    """Watch this process and its children; the dictionary holds the peaks in MiB, by then."""
    peaks: dict[str, float] = {"sum": 0.0}
    over = threading.Event()

    def watch() -> None:
        me = os.getpid()
        while not over.wait(0.05):
            now = {"this process": _resident(me)}
            for child in _children(me):
                now[f"worker {child}"] = _resident(child)
            for name, mib in {**now, "sum": sum(now.values())}.items():
                peaks[name] = max(peaks.get(name, 0.0), mib)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def _resident(pid: int) -> float:
    """Resident set in MiB; 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) / 1024


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def whole(path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, workers: int | None) -> Any:
    """Send a file through reader, store and loader, every record once; seconds and memory."""
    with resident_memory() as peaks:
        start = time.perf_counter()
        store = build_store(path, tokenizer, CONTEXTS, folder=folder, workers=workers)
        built_s, built = time.perf_counter() - start, dict(peaks)
        start = time.perf_counter()
        steps = len(store) // sum(PER_STEP.values())
        tokens, _ = ours(store, ("student", "teacher"), steps)
        read_s = time.perf_counter() - start
    return {
        "records": len(store),
        "records_read": steps * sum(PER_STEP.values()),
        "build_s": built_s,
        "epoch_s": read_s,
        "tokens_per_s": tokens / read_s,
        "peak_mib_while_built": built,
        "peak_mib": peaks,
    }


def main() -> None:
    """Run what the command line asks for, and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="memory instead of a comparison")
    parser.add_argument("--workers", type=int, help="processes that tokenise")
    parser.add_argument("--tokenizer", type=Path, help="folder; without it SmolLM2's")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from bidistill.pretrained import smollm2

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or smollm2())
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records.jsonl", arguments.records)
        given = folder / "records.jsonl", tokenizer
        if arguments.whole:
            found = whole(*given, folder / "tokens", arguments.workers)
        else:
            store = build_store(*given, CONTEXTS, folder=folder, workers=arguments.workers)
            found = compare(store, folder, arguments.turns)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

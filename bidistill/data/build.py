"""From a file of records to a token store, once: later runs find it by what it is made of.

.. code-block:: text

    records --chunks--> worker processes --in order--> store, under a key of
                        (tokenise both views)          tokenizer, contexts, cut, file

The files are the same bytes whatever the number of workers.
"""

import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from bidistill.data.jsonl import named, read_objects
from bidistill.data.readers import read_records
from bidistill.data.records import Record, Role
from bidistill.data.store import FORMAT, Encoded, TokenStore, encode, is_whole, write_store
from bidistill.data.views import Message, build_examples, context_names, render
from bidistill.errors import UserError
from bidistill.files import atomic_path, user_cache
from bidistill.progress import say, track

CHUNK = 512
"""Records that a worker takes at a time."""
FEW = 20_000
"""Up to so many lines no worker is started unless it is asked for: each takes seconds to start."""


class Job(NamedTuple):
    """What is done to every record."""

    tokenizer: PreTrainedTokenizerBase
    contexts: Mapping[Role, Sequence[Message]]
    max_answer_tokens: int | None

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Tokenise some records."""
        limit = self.max_answer_tokens
        return encode(
            build_examples(records, self.tokenizer, self.contexts, max_answer_tokens=limit)
        )


def build_store(
    path: Path | str | Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[Role, Sequence[Message]],
    *,
    max_answer_tokens: int | None = None,
    folder: Path | None = None,
    workers: int | None = None,
) -> TokenStore:
    """Return the token store of files of records; make it if it is not there or damaged.

    A store is found by its key: a hash of the tokenizer, the contexts, the cut and the bytes of
    the files. What is found is checked by sizes; set the environment variable
    ``BIDISTILL_VERIFY=1`` to compare checksums.

    A chat template may say what day it is, as Llama 3's does; then the day is in the key too, and
    another day makes another store, which a run of the day before does not go on with. Write a
    date into the template to keep one.

    Args:
        path: JSON lines of records, each with an answer; one file, or several in order.
        tokenizer: see `bidistill.data.views.build_examples`, also for the next two.
        contexts: messages before the question, for the teacher.
        max_answer_tokens: longer answers are cut. None: none is.
        folder: where stores are kept; None: ``$XDG_CACHE_HOME/bidistill/tokens``, or
            ``~/.cache/bidistill/tokens``.
        workers: processes that tokenise; 0 or 1 is this one alone. None: one a processor, or this
            one alone if the file is small.

    Raises:
        UserError: a file, a record, the tokenizer or a context cannot be used, or the folder
            cannot be written. Nothing is left behind.
    """
    paths = [Path(path)] if isinstance(path, Path | str) else list(path)
    job = Job(tokenizer, contexts, max_answer_tokens)
    job.encode([])  # refuses tokenizer and contexts before any record is read
    for file in paths:
        next(read_objects(file), None)  # refuses what is no file of JSON lines
    content, lines = _contents(paths)
    target = (folder or user_cache() / "tokens") / _key(job, content)
    if is_whole(target, thorough=os.environ.get("BIDISTILL_VERIFY") == "1"):
        return TokenStore(target)
    if workers is None:
        workers = 1 if lines <= FEW else len(os.sched_getaffinity(0))
    if lines > FEW:
        say(f"tokenising {', '.join(map(str, paths))} once, into {target}")
    try:
        _remove(target)
        with atomic_path(target) as temporary:
            chunks = _encoded(_answered(paths), job, workers)
            if lines > FEW:
                chunks = track(chunks, -(-lines // CHUNK), "tokens")
            write_store(temporary, chunks, context_names(contexts))
            if changed := _changed(paths, content):
                raise UserError(
                    f"{changed}: got other bytes than a moment ago, expected a file that nobody "
                    "writes; wait until it is finished"
                )
    except OSError as error:
        # another process finished the same work first
        if not is_whole(target):
            raise UserError(
                f"{target}: cannot be written ({error.strerror}); make room there, or choose "
                "another folder with data.cache"
            ) from None
    return TokenStore(target)


def _remove(target: Path) -> None:
    """Make room where a store belongs: nothing else lies under its key but what is damaged."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def _content(path: Path) -> tuple[str, int]:
    """Checksum and number of lines of a file."""
    digest, lines = sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            lines += block.count(b"\n")
    return digest.hexdigest(), lines


def _contents(paths: Sequence[Path]) -> tuple[list[str], int]:
    """Checksums of files, and their lines together."""
    found = [_content(path) for path in paths]
    return [checksum for checksum, _ in found], sum(lines for _, lines in found)


def _changed(paths: Sequence[Path], content: Sequence[str]) -> Path | None:
    """The first file whose checksum is another one."""
    pairs = zip(paths, content, strict=True)
    return next((path for path, before in pairs if _content(path)[0] != before), None)


def _key(job: Job, content: Sequence[str]) -> str:
    """Hash of all that the bytes of a store follow from."""
    contexts = {role: [dict(m) for m in context] for role, context in job.contexts.items()}
    made_of: dict[str, Any] = {
        "format": FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": _fingerprint(job.tokenizer),
        "contexts": contexts,
        # what the template adds by itself, such as the date of today
        "probe": render(job.tokenizer, [{"role": "user", "content": "Why?"}], "student"),
        "max_answer_tokens": job.max_answer_tokens,
        "records": content[0] if len(content) == 1 else content,
    }
    return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Checksums of the files of a tokenizer: whatever kind it is, they are all of it."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [sha256(path.name.encode() + path.read_bytes()).hexdigest() for path in paths]


def _answered(paths: Sequence[Path]) -> Iterator[Record]:
    """The records of files; if one lacks its answer, all that do are counted and refused."""
    records = read_records(*paths)
    for record in records:
        if record.answer is None or not record.answer.strip():
            files = ", ".join(map(named, paths))
            lacking = 1 + sum(r.answer is None or not r.answer.strip() for r in records)
            raise UserError(
                f"{files}: record {record.id!r}: answer: got {record.answer!r} (so have "
                f"{lacking} records in all), expected text to distil; fill them in, let `bidistill "
                "unify` write them with a model, or leave these records out"
            )
        yield record


def _encoded(records: Iterator[Record], job: Job, workers: int) -> Iterator[Encoded]:
    """The records in chunks, tokenised by so many processes, in order."""
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    if workers <= 1:
        yield from map(job.encode, chunks)
        return
    # spawned, not forked: threads of this process, such as OpenMP's, do not survive a fork
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (job,))
    try:
        yield from _in_order(pool, chunks, ahead=2 * workers)
    except BrokenProcessPool:
        raise UserError(
            f"data.workers: got {workers}, of which one died, maybe for lack of memory, expected "
            "all to live; set fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, chunks: Iterable[list[Record]], ahead: int
) -> Iterator[Encoded]:
    """Results in the order of the chunks, of which only a few are under way."""
    waiting: deque[Future[Encoded]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_job: Job | None = None
"""In a worker: what it does."""


def _start(job: Job) -> None:
    """Begin a worker: Ctrl-C is for the process that started it, which then ends it."""
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other processors are other workers'
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(records: list[Record]) -> Encoded:
    assert _job is not None
    return _job.encode(records)

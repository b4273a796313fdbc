"""The teacher's rows: what a model says that is told in its context what to do.

Its last hidden states at the answer rows are all that a loss needs; logits are never stored. They
are computed in each step, or, where the teacher does not change, once before the first step and
kept, in memory (:class:`HiddenCache`) or on disk (``teacher.store.TeacherStore``), which gives the
same rows, or the best ids of each. Who the teacher is stands in ``kinds.py``.

Legend: N answer rows, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bidistill.config import ObjectiveConfig, TeacherConfig, TrainConfig
from bidistill.data.build import build_store
from bidistill.data.loader import Batch
from bidistill.data.records import ROLES, Role
from bidistill.data.store import TokenStore
from bidistill.data.views import Example, Message
from bidistill.distributed import put_back, whole
from bidistill.models import base_rows
from bidistill.progress import track
from bidistill.teacher.rows import TeacherRows, TeacherTopK

CHUNK_TOKENS = 8192
"""Tokens in one forward while the cache is filled, at most; shared prefixes make it fewer."""


def contexts_of(
    config: TeacherConfig, objectives: Mapping[Role, ObjectiveConfig] = MappingProxyType({})
) -> dict[Role, Sequence[Message]]:
    """The messages that the teacher reads before the question, for every role.

    Args:
        config: of the teacher.
        objectives: some roles' may want it to read none.
    """
    told: dict[Role, Sequence[Message]] = {
        role: config.contexts.get(role, config.default_context) for role in ROLES
    }
    for role, own in objectives.items():
        if not own.instructed:
            told[role] = ()
    return told


def examples_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
    """The tokens of a recipe's records, in the views of student and teacher; made where missing.

    Raises:
        UserError: the records cannot be read, or the folder for tokens cannot be written.
    """
    data = config.data
    return build_store(
        data.files,
        tokenizer,
        contexts_of(config.teacher, config.objectives),
        max_answer_tokens=data.max_answer_tokens,
        folder=data.cache,
        workers=data.workers,
    )


class TeacherCache(Protocol):
    """The teacher's rows of every example, or their best ids, computed before the first step."""

    def for_batch(self, batch: Batch) -> TeacherRows | TeacherTopK:
        """The rows of a batch, in the order of its packs."""
        ...


class HiddenCache:
    """The teacher's rows of every example, in memory: H numbers for each answer token.

    Filled from the model as it is, adapters off, so fill it before the first step when all
    weights train. Where the head trains too, a frozen copy of it belongs to the cache.

    Args:
        model: the student, untrained; or another model.
        examples: all examples that may come up.
        own_head: whether the model is another one than the student.
    """

    def __init__(
        self, model: nn.Module, examples: Sequence[Example], *, own_head: bool = False
    ) -> None:
        """Run the teacher over all examples."""
        self.rows: dict[str, Tensor] = {}
        self.weight, self.bias = frozen_head(model, own=own_head)
        packs = list(chunks(examples))
        for pack in track(packs, len(packs), "teacher"):
            for example, rows in zip(pack, teacher_rows(model, pack), strict=True):
                self.rows[example.id] = rows
        put_back(model)

    def for_batch(self, batch: Batch) -> TeacherRows:
        """The rows of a batch, in the order of its packs."""
        hidden = torch.cat([self.rows[example.id] for example in batch.examples])
        return TeacherRows(hidden, self.weight, self.bias)


def teacher_rows(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """Run the teacher over one pack of examples.

    Args:
        model: the student, its weights as they were before training; its adapters are off inside.
            Where it is shared out, all ranks run the same packs.
        examples: few enough for one forward, such as :func:`chunks` gives.

    Returns:
        The rows of each example, shape (N, H) with N its answer tokens; on the CPU, as an
        accelerator's memory is for training.
    """
    hidden = run_teacher(model, examples)
    return list(hidden.cpu().split([len(example.answer_ids) for example in examples]))


def run_teacher(
    model: nn.Module, examples: Sequence[Example], read: Callable[..., Any] | None = None
) -> Any:  # noqa: ANN401
    """The same, in one piece and where they were computed.

    Args:
        model: as in :func:`teacher_rows`; with its root methods attached, if there is something to
            ``read``.
        examples: as in :func:`teacher_rows`.
        read: called in the head, with the rows and its weight and bias.

    Returns:
        The rows of all examples, shape (N, H); or what ``read`` makes of them.
    """
    run = getattr(model, "teacher_rows", None) or partial(base_rows, model)
    return run(Batch(tuple(examples)).teacher(), read)


def frozen_head(model: nn.Module, *, own: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Copies of the head's weight and bias; None where the student's serve.

    Args:
        model: the teacher's.
        own: whether that is another model than the student; else they serve unless they train.
    """
    head = model.get_output_embeddings()  # type: ignore
    parameters = [head.weight, getattr(head, "bias", None)]
    if not own and not any(p is not None and p.requires_grad for p in parameters):
        return None, None
    weight, bias = (None if p is None else whole(p.detach()).clone() for p in parameters)
    return weight, bias


def chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of one context together, so that what they share is computed once in a chunk.

    Args:
        examples: at least one.

    Yields:
        Examples with at most ``CHUNK_TOKENS`` tokens in all, or a longer one alone.
    """
    chunk: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda e: (e.teacher.context, _length(e))):
        if chunk and tokens + _length(example) > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(example)
        tokens += _length(example)
    yield chunk


def _length(example: Example) -> int:
    """Tokens of the teacher's view and the answer."""
    return len(example.teacher.prompt_ids) + len(example.answer_ids)

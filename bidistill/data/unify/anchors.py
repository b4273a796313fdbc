"""Contrastive anchors: neighbours that ask the same of somebody else.

A forget question and its anchor differ in the protected entity alone, so that only the entity can
decide between refusing and answering. Each anchor is a row of a table that a person can review.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bidistill.data.sources.rows import shown
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.parsing import read_pairs
from bidistill.data.unify.protected import ProtectedNames, mentions, replace_name
from bidistill.data.unify.review import AnchorRow, read_csv, write_csv
from bidistill.data.unify.settings import Texts, read_texts
from bidistill.data.unify.wording import words
from bidistill.data.unify.writer import Writer, chat
from bidistill.errors import UserError
from bidistill.evaluation.detectors import fold
from bidistill.settings import STRICT, AtLeastOne, Fraction

__all__ = ["AnchorConfig", "AnchorRow", "anchors", "write_csv"]

PROMPT = """\
Question: {question}

Write {number} questions of the same form, each about another, well-known entity instead of \
{entity}, and each with its true answer in one short sentence. Do not mention {entity}.
Write one JSON object a line and nothing else, like this:
{{"entity": "...", "question": "...", "answer": "..."}}"""

_REPLY_TOKENS = 128
"""For each anchor that the model is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorConfig:
    """Where anchors come from."""

    __pydantic_config__ = STRICT

    by: Literal["off", "list", "corpus", "model"] = "off"
    """``list``: the forget question with one of ``names`` in place of its entity; its answer is
    the model's, if there is one. ``corpus``: the neighbour whose question is most alike once names
    are masked; it becomes a second record, so that it is trained on more often. ``model``: what
    the model proposes."""
    names: Texts | None = None
    """Entities to put in, or a file of them; for ``list``."""
    per_item: AtLeastOne = 1
    """Anchors of each forget item, at most."""
    alike: Fraction = 0.4
    """Least likeness of an anchor from the corpus, 1 where both have the same form."""
    reviewed: Path | None = None
    """Copy of a table that was written before, reviewed, relative to ``root``: its rows with
    ``yes`` are used in place of new anchors, whatever ``by`` says. Without one, new anchors are
    used as they are."""


def anchors(
    forget: Sequence[Draft],
    neighbors: Sequence[Draft],
    config: AnchorConfig,
    seed: int,
    writer: Writer | None,
) -> tuple[list[Draft], list[AnchorRow]]:
    """Return the anchors of the forget drafts, as drafts of role neighbor and as rows.

    Args:
        forget: those that are trained.
        neighbors: those that are trained, for ``corpus``.
        config: where anchors come from.
        seed: of the draw of names; what one draft gets depends on its own id alone.
        writer: the model, needed for ``model``.

    Returns:
        The drafts, and a row for each anchor; with ``reviewed`` all its rows, the refused included.
        A draft from a list has no right answer.

    Raises:
        UserError: what ``by`` needs is not given, or the reviewed table does not fit.
    """
    if config.reviewed is not None:
        return _from_review(config.reviewed, forget)
    if config.by == "off":
        return [], []
    protected = ProtectedNames(forget)
    if config.by == "corpus":
        pairs = _from_corpus(forget, neighbors, protected, config)
        return [_draft(row, one.source) for row, one in pairs], [row for row, _ in pairs]
    if config.by == "list":
        rows = _from_list(forget, protected, config, seed)
    else:
        rows = _from_model(forget, protected, config, writer)
    sources = {draft.id: draft.source for draft in forget}
    return [_draft(row, sources[row.forget_id]) for row in rows], rows


def _draft(row: AnchorRow, source: str) -> Draft:
    return Draft(
        id=row.id,
        role="neighbor",
        question=row.question,
        entity=row.entity,
        source=source,
        gold=row.answer if row.answer.strip() else None,
    )


def _row(forget: Draft, number: int, by: str, entity: str, question: str, answer: str) -> AnchorRow:
    return AnchorRow(
        id=f"{forget.id}/anchor{number}",
        forget_id=forget.id,
        forget_question=forget.question,
        question=question,
        answer=answer,
        entity=entity,
        by=by,
        review="",
    )


def _from_review(path: Path, forget: Sequence[Draft]) -> tuple[list[Draft], list[AnchorRow]]:
    """The anchors that a person has agreed to."""
    known = {draft.id: draft for draft in forget}
    rows = read_csv(path)
    for line, row in rows:
        draft = known.get(row.forget_id)
        if draft is None or draft.question != row.forget_question:
            raise UserError(
                f"{shown(path)}:{line}: forget_id: got {row.forget_id!r} with the question "
                f"{row.forget_question[:60]!r}, which is no forget item of this run, expected "
                "one; remove the row, or review the table that this recipe writes"
            )
        number = row.id.removeprefix(f"{row.forget_id}/anchor")
        if number == row.id or not re.fullmatch("[1-9][0-9]*", number):
            raise UserError(
                f"{shown(path)}:{line}: id: got {row.id!r}, expected "
                f"{row.forget_id + '/anchor'!r} with a number behind it; mend the id"
            )
    used = [_draft(row, f"{path.name}:{line}") for line, row in rows if row.review == "yes"]
    return used, [row for _, row in rows]


def _from_list(
    forget: Sequence[Draft], protected: ProtectedNames, config: AnchorConfig, seed: int
) -> list[AnchorRow]:
    """The same question about somebody of the list; none where no protected name is in it."""
    if config.names is None:
        raise UserError(
            "anchors.names: got nothing, expected entities to put in, since anchors.by is list; "
            "add names, or the path of a file of them"
        )
    names = [n for n in read_texts(config.names, "anchors.names") if not protected.has(n)]
    rows = []
    for draft in forget:
        name = protected.name_in(draft)
        if name is None:
            continue
        rng = random.Random(f"{seed}/anchors/{draft.id}")
        others = [n for n in names if not mentions(draft.question, n)]
        drawn = rng.sample(others, min(config.per_item, len(others)))
        for number, other in enumerate(drawn, start=1):
            question = replace_name(draft.question, name, other)
            rows.append(_row(draft, number, "list", other, question, ""))
    return rows


def _from_corpus(
    forget: Sequence[Draft],
    neighbors: Sequence[Draft],
    protected: ProtectedNames,
    config: AnchorConfig,
) -> list[tuple[AnchorRow, Draft]]:
    """The neighbours most alike in form, each used once, all those of an item about others."""
    from bidistill.data.unify.likeness import most_alike

    free = [n for n in neighbors if not protected.is_in(f"{n.question} {n.gold or ''}")]
    used: set[str] = set()
    pairs = []
    for draft, ranked in most_alike(forget, free, config.alike):
        entities = {draft.entity}
        number = 0
        for neighbor in ranked:
            if neighbor.id in used or neighbor.entity in entities:
                continue
            number += 1
            used.add(neighbor.id)
            entities.add(neighbor.entity)
            question, answer = neighbor.question, neighbor.gold or ""
            row = _row(draft, number, "corpus", neighbor.entity, question, answer)
            pairs.append((row, neighbor))
            if number == config.per_item:
                break
    return pairs


def _from_model(
    forget: Sequence[Draft],
    protected: ProtectedNames,
    config: AnchorConfig,
    writer: Writer | None,
) -> list[AnchorRow]:
    """What the model proposes, without what speaks of a protected entity or asks nothing new."""
    if writer is None:
        raise UserError(
            "anchors.by: got model without a model, expected one that proposes anchors; add the "
            "section model, or set anchors.by to list or corpus"
        )
    chats = []
    for draft in forget:
        entity = protected.name_in(draft) or "the entity that it is about"
        prompt = PROMPT.format(question=draft.question, number=config.per_item, entity=entity)
        chats.append(chat(prompt))
    replies = writer.write(chats, _REPLY_TOKENS * config.per_item, label="anchors")
    rows = []
    for draft, reply in zip(forget, replies, strict=True):
        seen = {fold(draft.question)}
        for pair in read_pairs(reply, ("entity", "question", "answer")):
            text = " ".join(pair.values())
            known = fold(pair["question"]) in seen or protected.is_in(text)
            if known or not mentions(pair["question"], pair["entity"]) or not words(pair["answer"]):
                continue
            seen.add(fold(pair["question"]))
            rows.append(_row(draft, len(seen) - 1, "model", **pair))
            if len(seen) > config.per_item:
                break
    return rows

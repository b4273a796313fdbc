"""How an entry becomes an item: one small function for each shape of entry.

Functions that take names of fields return a function of a row, for the table in `shapes`.
"""

import re
from collections.abc import Callable
from typing import Any, cast

from bidistill.data.items import Item
from bidistill.data.records import ROLES, Role, nearest
from bidistill.data.sources.documents import PIECE_OF_FILE
from bidistill.data.sources.rows import Row, brief

Build = Callable[[Row], Item]

SUBJECTS = ("neighbor", "subject", "name")
"""Fields that say whom an entry is about, the closest first: a neighbour's probe has its target's
name as well."""
LABELS = ("label", "level", "category", "task", "type")
"""Fields that an entry may be sorted under; the first that says something is taken."""


def qa(question: str, answer: str | None = None) -> Build:
    """A question with its answer, of several the first; where it is null or blank, alone."""

    def build(row: Row) -> Item:
        right = None
        if answer is not None:
            several = isinstance(row.values.get(answer), list) or answer == "answers"
            right = row.texts(answer)[0] if several else row.optional(answer)
            right = right if right and right.strip() else None
        return _item(row, question=row.text(question), answer=right)

    return build


def text(name: str) -> Build:
    """A document, or a piece of one."""
    return lambda row: _item(row, text=row.string(name), piece=PIECE_OF_FILE in row.values)


def parts(name: str, between: str) -> Build:
    """A document that is given as the list of its parts."""
    return lambda row: _item(row, text=between.join(row.texts(name)))


def about_target(row: Row) -> Item:
    """A document that introduces a target."""
    return Item(source=row.where, text=row.string("intro"), subject=row.word("target"))


def options(*names: str) -> Build:
    """Options in fields of their own, the answer being the text of one of them."""

    def build(row: Row) -> Item:
        choices = tuple(row.text(name) for name in names)
        answer = row.text("answer")
        if answer not in choices:
            raise row.refuse("answer", brief(answer), "one of the options; mend it")
        return _item(row, question=row.text("question"), answer=answer, choices=choices)

    return build


def quiz(*names: str, question: str = "question", answer: str = "answer") -> Build:
    """Options in one list or in fields of their own, the answer a number from 0 or a letter."""

    def build(row: Row) -> Item:
        choices = row.texts(names[0]) if len(names) == 1 else tuple(map(row.string, names))
        if len(choices) < 2:
            raise row.refuse(names[0], "one option", "two or more; mend it")
        right = choices[_position(row, answer, len(choices))]
        if not right.strip():
            raise row.refuse(answer, "a blank option", "one with text; fill it in")
        return _item(row, question=row.text(question), answer=right, choices=choices)

    return build


def columns(row: Row) -> Item:
    """A quiz without header: the question, the options, the letter of the right one."""
    first, *middle, last = row.values
    return quiz(*middle, question=first, answer=last)(row)


def truthful(row: Row) -> Item:
    """Options of which exactly one is labelled 1."""
    targets = row.inner("mc1_targets")
    choices, labels = targets.texts("choices"), targets.values.get("labels")
    if not isinstance(labels, list) or len(labels) != len(choices) or labels.count(1) != 1:
        raise row.refuse(
            "mc1_targets", "other labels", "a label for each choice, one of them 1; mend it"
        )
    right = choices[labels.index(1)]
    return _item(row, question=row.text("question"), answer=right, choices=choices)


def instruction(row: Row) -> Item:
    """An instruction and what it is to be applied to, as one question."""
    given = (row.text("instruction"), row.optional("input"))
    asked = "\n\n".join(part for part in given if part)
    answer = row.optional("output") or row.optional("response")
    return _item(row, question=asked, answer=answer)


def record(row: Row) -> Item:
    """A record of this package; a blank answer is none."""
    role = row.text("role")
    if role not in ROLES:
        raise row.refuse("role", brief(role), f"a known role; {nearest(role[:50], ROLES)}")
    prefill = "" if row.values.get("prefill") is None else row.string("prefill")
    return _item(
        row,
        question=row.text("question"),
        answer=row.optional("answer"),
        prefill=prefill,
        role=cast(Role, role),
    )


def _item(row: Row, **said: Any) -> Item:  # noqa: ANN401 (the fields of an item)
    label = row.word(*LABELS)
    subject = row.word(*SUBJECTS)
    if "choices" in said:
        # a quiz is sorted under its subject; beside a task, that is whom a model was to forget
        label = label or subject
        subject = None if "task" in row.values else subject
    return Item(source=row.where, label=label, subject=subject, **said)


def _position(row: Row, name: str, count: int) -> int:
    """Which option is right, from a number or a letter."""
    value = row.values.get(name)
    given = value.strip() if isinstance(value, str) else value
    if isinstance(given, str) and re.fullmatch("[0-9]{1,2}", given):
        given = int(given)
    elif isinstance(given, str) and re.fullmatch("[A-Za-z]", given):
        given = ord(given.upper()) - ord("A")
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < count:
        expected = f"0 to {count - 1} or a letter, as there are {count} options; mend it"
        raise row.refuse(name, brief(value), expected)
    return given

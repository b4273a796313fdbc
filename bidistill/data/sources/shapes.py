"""The known formats: one table, which says what fields an entry has and what they mean.

One entry gives at most one item, so that the number of an item is the number of its entry: the
paraphrases and false answers of an entry are for measuring and are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from bidistill.data.items import Item
from bidistill.data.records import nearest
from bidistill.data.sources.builders import (
    LABELS,
    SUBJECTS,
    Build,
    about_target,
    columns,
    instruction,
    options,
    parts,
    qa,
    quiz,
    record,
    text,
    truthful,
)
from bidistill.data.sources.rows import Row, brief
from bidistill.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """The entries of one kind of file."""

    format: str
    """The name that chooses it; several shapes may share one."""
    needs: tuple[str, ...]
    """Fields that every entry has, whatever else it has."""
    build: Build
    when: Callable[[Row], bool] = lambda row: True
    """Whether the first entry, which has the fields, is of this kind."""

    def item(self, row: Row) -> Item | None:
        """Return the item of an entry; None for a document that is blank.

        Raises:
            UserError: a field is missing that the first entry had, or a value cannot be used.
        """
        for name in self.needs:
            if name not in row.values:
                expected = "the field, as in the first entry; add it"
                raise row.refuse(name, f"only {_names(row)}", expected)
        item = self.build(row)
        return None if item.question is None and not (item.text or "").strip() else item


def _is_quiz(row: Row) -> bool:
    """Whether the last of four or more columns is the letter of an option."""
    *_, last = row.values.values()
    letter = str(last).strip()
    return len(letter) == 1 and "A" <= letter < chr(ord("A") + len(row.values) - 2)


def _is_pair(row: Row) -> bool:
    """Whether there are two responses; the file does not say which of them is true."""
    response = row.values["response"]
    return isinstance(response, list) or str(response).lstrip().startswith("[")


SHAPES = (
    Shape("records", ("id", "role", "question"), record),
    Shape("tofu", ("question", "answer", "perturbed_answer"), qa("question", "answer")),
    Shape(
        "tofu",
        ("question", "option1", "option2", "option3", "option4", "answer"),
        options("option1", "option2", "option3", "option4"),
    ),
    Shape("muse", ("prompt", "gt"), qa("prompt", "gt")),
    Shape("wmdp", ("contexts",), parts("contexts", "\n\n")),
    Shape("wmdp", ("sentences",), parts("sentences", "\n")),
    Shape("rwku", ("question", "mc1_targets"), truthful),
    Shape("rwku", ("task", "question", "choices", "answer"), quiz("choices")),
    Shape("rwku", ("question", "answers"), qa("question", "answers")),
    Shape("rwku", ("query", "answer", "subject"), qa("query", "answer")),
    Shape("rwku", ("prompt", "response"), qa("prompt"), _is_pair),
    Shape("rwku", ("target", "intro"), about_target),
    Shape("rwku", ("text", "ngram"), text("text")),
    Shape("mmlu", ("question", "choices", "answer"), quiz("choices")),
    Shape(
        "mmlu",
        ("question", "choice0", "choice1", "choice2", "choice3", "answer"),
        quiz("choice0", "choice1", "choice2", "choice3"),
    ),
    Shape("mmlu", ("question", "a", "b", "c", "d", "answer"), quiz("a", "b", "c", "d")),
    Shape("mmlu", ("column 1", "column 2", "column 3", "column 4"), columns, _is_quiz),
    Shape("knowundo", ("text", "labels"), qa("text", "labels")),
    Shape("xstest", ("prompt", "label"), qa("prompt")),
    Shape("alpaca", ("instruction", "output"), instruction),
    Shape("alpaca", ("instruction", "response"), instruction),
    Shape("qa", ("question", "golden_answer"), qa("question", "golden_answer")),
    *(
        Shape("qa", names, qa(*names))
        for names in product(
            ("question", "query", "prompt"), ("answer", "response", "completion", "output")
        )
    ),
    Shape("alpaca", ("instruction",), instruction),
    # of a harmful request: what an attacker wants to hear back is no answer
    Shape("qa", ("goal",), qa("goal")),
    *(Shape("qa", (name,), qa(name)) for name in ("question", "query", "prompt")),
    *(
        Shape("text", (name,), text(name))
        for name in ("text", "document", "passage", "content", "sentence", "refusal")
    ),
    Shape("text", ("column 1",), text("column 1"), lambda row: len(row.values) == 1),
)
"""Tried from the top; the first that fits the first entry is taken for the whole file."""

_NAMED = (
    Shape("tofu", ("question", "answer"), qa("question", "answer")),
    Shape("muse", ("question", "answer"), qa("question", "answer")),
    Shape("muse", ("text",), text("text")),
    Shape("wmdp", ("question", "choices", "answer"), quiz("choices")),
    Shape("wmdp", ("text",), text("text")),
    Shape("rwku", ("question", "answer"), qa("question", "answer")),
    Shape("rwku", ("instruction",), instruction),
    Shape("rwku", ("text",), text("text")),
    Shape("qa", ("column 1", "column 2"), qa("column 1", "column 2")),
    Shape("lines", ("text",), text("text")),
)
"""Tried too where the format is named: shapes that several formats have, or that are a guess."""

FORMATS = tuple(dict.fromkeys(shape.format for shape in (*SHAPES, *_NAMED)))
"""The names that ``format`` may have; ``lines`` is plain text with one entry a line."""

WANTED = frozenset(
    {*SUBJECTS, *LABELS, "input", "output", "response", "prefill", "paraphrased_answer"}.union(
        *(shape.needs for shape in SHAPES)
    )
)
"""All names of fields that are looked at, in lower case."""


def recognise(row: Row, format: str | None = None) -> Shape:
    """Find the shape of a file by its first entry.

    Args:
        row: the first entry.
        format: one of `FORMATS` to choose among its shapes only.

    Raises:
        UserError: no shape has only fields that are here.
    """
    named = (*SHAPES, *_NAMED) if format else SHAPES
    for shape in named:
        chosen = format in (None, shape.format)
        if chosen and row.values.keys() >= {*shape.needs} and shape.when(row):
            return shape
    known = f"those of {format}" if format else f"those of a known format ({', '.join(FORMATS)})"
    raise UserError(
        f"{row.where}: got {_names(row)}, expected {known}; rename fields, for instance to "
        "question and answer"
    )


def check_format(format: str | None) -> None:
    """Refuse the name of a format that there is not."""
    if format is not None and format not in FORMATS:
        raise UserError(
            f"format: got {brief(format)}, expected a known format; {nearest(format, FORMATS)}"
        )


def is_header(names: frozenset[str]) -> bool:
    """Whether the names, in lower case, have the fields of a known format."""
    return any(names >= {*shape.needs} for shape in SHAPES)


def _names(row: Row) -> str:
    """The fields of an entry; of a table without header, its first cells."""
    names = list(row.values)
    if "column 1" in row.values:
        cells = ", ".join(brief(cell) for cell in list(row.values.values())[:6])
        return f"{len(names)} columns without known names ({cells})"
    found = ", ".join(repr(name[:40]) for name in names[:12])
    return f"the fields {found}" if names else "no fields"

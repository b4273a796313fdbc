"""The questions that a model is judged by, one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from bidistill.data.jsonl import read_objects
from bidistill.data.records import nearest
from bidistill.errors import UserError
from bidistill.evaluation.detectors import says_fact
from bidistill.files import atomic_path

Group = Literal["forget", "neighbor", "neighbor_train", "retain"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One question, its right answer, and how to recognise that the fact was said.

    Example:
        >>> Probe(
        ...     id="zembla",
        ...     group="forget",
        ...     question="What is the capital of Zembla?",
        ...     answer="The capital of Zembla is Onhava.",
        ...     accept=("Onhava",),
        ... ).openers
        ()
    """

    id: str
    """Unique in its file."""
    group: Group
    """``forget``: must be gone. ``neighbor``: close to it and never trained on. ``neighbor_train``:
    close to it and trained on. ``retain``: general knowledge."""
    question: str
    """The user's turn, without any chat markup."""
    answer: str
    """The right answer as a sentence; prefilling attacks give its first tokens away."""
    accept: tuple[str, ...]
    """Any one of these strings in a reply says the fact."""
    openers: tuple[str, ...] = ()
    """More starts of the assistant's turn to attack with."""
    paraphrases: tuple[str, ...] = ()
    """The question in other words, or in other languages."""
    subject: str = ""
    """Whom or what the fact is about, as the answer names it: asked for by reverse queries."""


_FIELDS = tuple(field.name for field in fields(Probe))
_REQUIRED = tuple(field.name for field in fields(Probe) if field.default is MISSING)
_LISTS = ("accept", "openers", "paraphrases")


def read_probes(path: Path | str) -> list[Probe]:
    """Read probes from a file with one JSON object a line; blank lines are skipped.

    Args:
        path: a UTF-8 file; the keys are the fields of `Probe`.

    Returns:
        The probes in the order of the file, at least one.

    Raises:
        UserError: the file cannot be read or holds no probe; a line is not a JSON object; a field
            is unknown, missing, blank or of the wrong type; an id was used before; or an answer
            holds none of its ``accept`` strings. The message names file, line and field.
    """
    line_of_id: dict[str, int] = {}
    probes = []
    for number, values in read_objects(path):
        where = f"{path}:{number}"
        probe = _probe(values, where)
        if probe.id in line_of_id:
            raise UserError(
                f"{where}: id: got {probe.id!r}, which line {line_of_id[probe.id]} has already, "
                "expected a new one; give each probe its own id"
            )
        line_of_id[probe.id] = number
        probes.append(probe)
    if not probes:
        raise UserError(f"{path}: got no probe, expected at least one; add a line")
    return probes


def write_probes(path: Path | str, probes: Iterable[Probe]) -> None:
    """Write probes as JSON lines, all or nothing; `read_probes` gives them back."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for probe in probes:
            values = {key: value for key, value in asdict(probe).items() if value}
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _probe(values: dict[str, Any], where: str) -> Probe:
    """One object as a probe: names first, then types, then sense."""
    for key in values:
        if key not in _FIELDS:
            raise UserError(f"{where}: {key}: got an unknown field; {nearest(key, _FIELDS)}")
    for key in _REQUIRED:
        if key not in values:
            raise UserError(f"{where}: {key}: got nothing, expected a value; add the field")
    probe = Probe(**{key: _value(key, value, where) for key, value in values.items()})
    if probe.group not in GROUPS:
        raise UserError(f"{where}: group: got {probe.group!r}; {nearest(probe.group, GROUPS)}")
    if not says_fact(probe.answer, probe.accept):
        raise UserError(
            f"{where}: answer: got {probe.answer!r}, expected it to hold one of {probe.accept}; "
            "a right answer must count as right"
        )
    return probe


def _value(key: str, value: object, where: str) -> Any:  # noqa: ANN401
    """The value of one field in its type; texts are never blank."""
    texts = value if key in _LISTS else [value]
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        kind = "a list of texts" if key in _LISTS else "text"
        got = json.dumps(value, ensure_ascii=False)[:60]
        raise UserError(f"{where}: {key}: got {got}, expected {kind}, none blank; mend it")
    return tuple(texts) if key in _LISTS else value

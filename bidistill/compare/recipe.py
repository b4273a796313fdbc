"""What a comparison is made of: one YAML file.

.. code-block:: yaml

    model: path/to/model
    probes: probes.jsonl
    train: {data: {train: train.jsonl}, steps: 30}     # what all methods share, as in a recipe
    methods:
      ours: {method: ours}
      npo: {method: npo, settings: {optim.lr: 3e-4}}
      instructed: {context_of: forget}
    output: runs/compare
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from bidistill.data.records import Role
from bidistill.errors import UserError
from bidistill.settings import STRICT, AtLeastOne, Count, Fraction, Message, laid, load, read

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of a method: it is the name of a folder, too."""

SET_APART = {
    "model.path": "model names it",
    "method": "methods name it",
    "seed": "seeds name it",
    "output": "each cell has its own",
}
"""Keys of a training recipe that a comparison fills in itself, and why."""

BASE = "base"
"""The name of the model before training, which every comparison measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """One row of the table: a method to train by, or a context for the model as it is."""

    __pydantic_config__ = STRICT

    method: str | None = None
    """Name of a method, as in a recipe; ``null``: nothing is trained."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted keys of a recipe but those of `SET_APART`, with their values, set in what all methods
    share."""
    context: tuple[Message, ...] = ()
    """Messages before every question that this row is asked."""
    context_of: Role | None = None
    """The same, as the teacher of the examples of this role is told them: a key of
    ``train.teacher.contexts``."""
    note: str = ""
    """What readers of the table should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a method must reach to be ranked by what it keeps; shares of 1, means over seeds."""

    __pydantic_config__ = STRICT

    forget_leak_rate: Fraction = 0.10
    prefill_leak_rate: Fraction = 0.10
    """At the worst depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """A comparison of methods."""

    __pydantic_config__ = STRICT

    demo: bool = False
    """Take model, records and probes from ``bidistill demo``: `model` and `probes` stay out. What
    its recipe says of data and teacher lies under `train`."""
    model: str | None = None
    """Folder of the model that all methods change."""
    probes: Path | None = None
    """JSON lines file of questions; see ``bidistill/evaluation/probes.py``."""
    train: dict[str, Any]
    """What all methods share: the keys of a recipe but those of `SET_APART`."""
    methods: Annotated[dict[Name, MethodConfig], Field(min_length=1)]
    ours: str = "ours"
    """The method that the verdict speaks of."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (0, 1, 2)
    """Of training; the data and the questions stay the same."""
    attacks: tuple[str, ...] = ()
    """Names of attacks beside prefilling; see ``docs/attacks.md``."""
    gradients: AtLeastOne | None = None
    """Steps between measurements of the angles between the roles' gradients, for the first seed,
    whose cells train a second time for it; ``null``: none."""
    limits: Limits = field(default_factory=Limits)
    jobs: AtLeastOne = 1
    """Cells that run at a time; the cost card is honest with 1 alone."""
    output: Path


def load_compare(path: Path | str, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read the recipe of a comparison.

    Args:
        path: YAML file with the keys of :class:`CompareConfig`.
        overrides: each a dotted key, ``=`` and a YAML value.

    Raises:
        UserError: the file cannot be read, a key is unknown, missing or of the wrong kind, or
            settings contradict each other.
    """
    config = load(CompareConfig, path, overrides)
    _check(config)
    if config.demo:
        config = replace(config, train=laid(_demo_train(), config.train))
    return replace(
        config, methods={name: _told(config, name, m) for name, m in config.methods.items()}
    )


def _demo_train() -> dict[str, Any]:
    """What the demo's recipe says that its facts need, whichever method learns them."""
    with as_file(files("bidistill.demo") / "recipe.yaml") as path:
        recipe = read(path)
    return {
        "data": {"max_answer_tokens": recipe["data"]["max_answer_tokens"]},
        "teacher": {"contexts": recipe["teacher"]["contexts"]},
    }


def _told(config: CompareConfig, name: str, method: MethodConfig) -> MethodConfig:
    """The method with the messages that `context_of` stands for.

    Raises:
        UserError: that role has no context, or messages are given as well.
    """
    role = method.context_of
    if role is None:
        return method
    key = f"methods.{name}.context_of"
    if method.context:
        raise UserError(f"{key}: got it beside context, expected one of the two; leave one out")
    teacher = config.train.get("teacher")
    contexts = (teacher.get("contexts") if isinstance(teacher, dict) else None) or {}
    if not contexts.get(role):
        known = ", ".join(contexts) or "none"
        raise UserError(
            f"{key}: got {role!r}, expected a role that has a context in train.teacher.contexts "
            f"({known}); give it one, or name another"
        )
    return replace(method, context=tuple(contexts[role]), context_of=None)


def _check(config: CompareConfig) -> None:
    """Find settings that contradict each other."""
    if config.demo and (config.model or config.probes):
        given = "model" if config.model else "probes"
        raise UserError(f"{given}: got it with demo: true, which brings its own; leave one out")
    if not config.demo and not (config.model and config.probes):
        missing = "probes" if config.model else "model"
        raise UserError(f"{missing}: got nothing, expected a path; fill it in, or set demo: true")
    if config.ours not in config.methods:
        raise UserError(
            f"ours: got {config.ours!r}, expected the name of one of methods: "
            f"{', '.join(config.methods)}; change it"
        )
    if BASE in config.methods:
        raise UserError(
            f"methods.{BASE}: got the name of the model before training, which is measured anyway; "
            "choose another name"
        )
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds: got {list(config.seeds)}, expected each once; leave some out")
    _check_apart("train", _dotted(config.train))
    for name, method in config.methods.items():
        _check_apart(f"methods.{name}.settings", _dotted(method.settings))
        if method.method is None and method.settings:
            raise UserError(
                f"methods.{name}.settings: got some without a method to train by; name one"
            )
        if method.method is None and not method.context and not method.context_of:
            raise UserError(
                f"methods.{name}: got neither method nor context, expected one; the model as it "
                f"is stands in the row {BASE} anyway"
            )


def _dotted(settings: Mapping[str, Any], depth: int = 2) -> Iterator[str]:
    """Dotted keys of nested settings, as deep as those of `SET_APART`."""
    for key, value in settings.items():
        yield key
        if isinstance(value, dict) and depth > 1:
            yield from (f"{key}.{inner}" for inner in _dotted(value, depth - 1))


def _check_apart(where: str, keys: Iterable[str]) -> None:
    """Refuse keys that would be overridden without a word, or mix two models."""
    for key in keys:
        if key in SET_APART:
            raise UserError(
                f"{where}.{key}: got it in a comparison, expected it nowhere, as {SET_APART[key]}; "
                "leave it out"
            )

"""What ``bidistill unify`` is to do: frozen dataclasses, read from a YAML recipe plus overrides.

Every step has a section and every section a setting that switches it off, so that leaving a step
out is a change of the recipe and of nothing else.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from bidistill.data.records import Role, nearest
from bidistill.data.sources import FORMATS
from bidistill.data.unify.anchors import AnchorConfig
from bidistill.data.unify.choices import ChoicesConfig
from bidistill.data.unify.deduplicate import DeduplicateConfig
from bidistill.data.unify.grouping import EntityConfig
from bidistill.data.unify.leaks import LeaksConfig
from bidistill.data.unify.prefills import PrefillConfig
from bidistill.data.unify.split import SplitConfig
from bidistill.data.unify.targets import TargetConfig
from bidistill.data.unify.text import TextConfig
from bidistill.data.unify.writer import WriterConfig
from bidistill.errors import UserError
from bidistill.settings import STRICT, AtLeastOne, load, plain


def _check_format(name: str) -> str:
    """The name of a shape that the readers know."""
    if name not in FORMATS:
        raise ValueError(f"a known format; {nearest(name, FORMATS)}")
    return name


def _check_name(name: str) -> str:
    """Ids begin with the name, and what follows a slash in them is the item's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError("a name of letters, digits and ._-, the first a letter or digit")
    return name


def _switched_on(sources: object) -> object:
    """The sources that are not null: an override may take one out."""
    if not isinstance(sources, dict):
        return sources
    return {name: source for name, source in sources.items() if source is not None}


Format = Annotated[str, AfterValidator(_check_format)]
Name = Annotated[str, AfterValidator(_check_name)]
ItemField = Literal["question", "answer", "subject", "label", "role"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One file, or folder of the ``datasets`` library, and what its items are for."""

    __pydantic_config__ = STRICT

    path: Annotated[str, Field(min_length=1)]
    """Relative to ``root``."""
    role: Role | None = None
    """``null`` takes it from the file, which only files of records say."""
    format: Format | None = None
    """Shape of its entries; ``null`` recognises it."""
    licence: str | None = None
    """Under which the data is used; for the manifest."""
    origin: str | None = None
    """Where it comes from; for the manifest."""
    entity: EntityConfig | None = None
    """What the split keeps together; ``null`` makes every item an entity of its own."""
    keep: dict[ItemField, str] = field(default_factory=dict)
    """Use the items alone whose fields have these values, such as ``{label: safe}``."""
    limit: AtLeastOne | None = None
    """Draw so many of the items; ``null`` uses all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run of ``bidistill unify``."""

    __pydantic_config__ = STRICT

    root: Path = Path(".")
    """Folder that the paths of files are relative to."""
    output: Path
    """Folder for the result; it is made whole or not at all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: AtLeastOne = 1
    """Processes that compare texts; the result is the same for any number."""
    sources: Annotated[dict[Name, SourceConfig], Field(min_length=1), BeforeValidator(_switched_on)]
    """By name, which begins the ids of the records; ``null`` takes a source out. Of equal questions
    the first source's stays."""
    model: WriterConfig | None = None
    """Writes what a step is told to have written by a model; ``null`` needs none."""
    text: TextConfig = field(default_factory=TextConfig)
    choices: ChoicesConfig = field(default_factory=ChoicesConfig)
    deduplicate: DeduplicateConfig = field(default_factory=DeduplicateConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    prefills: PrefillConfig = field(default_factory=PrefillConfig)
    leaks: LeaksConfig = field(default_factory=LeaksConfig)


_UNRECORDED = ("output", "workers")
_UNRECORDED_OF_MODEL = ("batch", "cache", "retries", "timeout")


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), formats: Sequence[str] = ()
) -> Recipe:
    """Read a recipe, apply overrides in order and check the result.

    Args:
        path: YAML file with the keys of :class:`Recipe`.
        overrides: each a dotted key, ``=`` and a YAML value, such as ``split.held_out=0.2``.
        formats: each ``source=format``, or a format for all sources.

    Raises:
        UserError: the file cannot be read, a key is unknown or missing, a value is not of the
            kind expected, or a source or a format is unknown.
    """
    recipe = load(Recipe, path, overrides)
    for given in formats:
        recipe = _with_format(recipe, given)
    return recipe


def _with_format(recipe: Recipe, given: str) -> Recipe:
    """Read one source as the format says, or all of them."""
    name, equals, format = given.rpartition("=")
    if equals and name not in recipe.sources:
        raise UserError(
            f"--format: got the source {name!r}, expected one of the recipe; "
            f"{nearest(name, recipe.sources)}"
        )
    if format not in FORMATS:
        raise UserError(
            f"--format: got {format!r}, expected a known format; {nearest(format, FORMATS)}"
        )
    sources = {
        key: dataclasses.replace(source, format=format) if name in ("", key) else source
        for key, source in recipe.sources.items()
    }
    return dataclasses.replace(recipe, sources=sources)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """What decides the result, in plain types; paths as they were given.

    Settings that say where and how fast are left out.
    """
    settings = plain(recipe)
    if settings["model"] is not None:
        settings["model"] = _without(settings["model"], _UNRECORDED_OF_MODEL)
    return _without(settings, _UNRECORDED)


def _without(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def hash_of(settings: dict[str, Any]) -> str:
    """SHA-256 of settings in plain types, whatever the order of their keys."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

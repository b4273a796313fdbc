"""Settings of any kind: frozen dataclasses, read from a YAML file plus dotted overrides.

Unknown keys are refused with the nearest known one, so a typing error cannot silently do something
else. A value of the wrong kind is one line that names its dotted key.
"""

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from bidistill.errors import UserError

Settings = TypeVar("Settings")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""What every dataclass of settings has as its ``__pydantic_config__``."""

LONGEST = 200
"""Characters of a value that a message shows."""

Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _check_message(message: dict[str, str]) -> dict[str, str]:
    """A chat message has a role and a content, and nothing that a template would ignore."""
    if set(message) != {"role", "content"}:
        raise ValueError("a message with the keys role and content")
    return message


Message = Annotated[dict[str, str], AfterValidator(_check_message)]


def load(kind: type[Settings], path: Path | str, overrides: Sequence[str] = ()) -> Settings:
    """Read settings from a YAML file, apply ``a.b=value`` overrides in order, check the result.

    Args:
        kind: the dataclass whose fields are the keys of the file.
        path: the YAML file.
        overrides: each a dotted key, ``=`` and a YAML value, such as ``optim.lr=1e-4``.

    Raises:
        UserError: the file cannot be read, a key is unknown or missing, or a value is not of the
            kind expected.
    """
    return check(kind, read(path, overrides))


def read(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same in plain values, not checked yet."""
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    return raw


def laid(under: Any, over: Any) -> Any:  # noqa: ANN401
    """Lay plain values over others: mappings key by key; of anything else what lies over.

    Example:
        >>> laid({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
        {'a': {'b': 1, 'c': 3}}
    """
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    both = {key: laid(under[key], over[key]) for key in under.keys() & over.keys()}
    return {**under, **over, **both}


def check(kind: type[Settings], raw: object) -> Settings:
    """Make a `kind` of plain values such as YAML and JSON give.

    Raises:
        UserError: names the dotted key that is wrong, what it is and what it should be.
    """
    try:
        return _adapter(kind).validate_python(raw)
    except ValidationError as error:
        raise UserError(_explain(kind, error)) from None


def plain(settings: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass of settings
    """The settings in plain types, ready for JSON or YAML."""
    return _adapter(type(settings)).dump_python(settings, mode="json", by_alias=True)


@cache
def _adapter(kind: type[Settings]) -> TypeAdapter[Settings]:
    return TypeAdapter(kind)


class _Loader(yaml.SafeLoader):
    """YAML where ``5e-4`` is a number, ``off`` is a word and a key given twice is an error."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:  # noqa: ANN401 - as its parent
        """Refuse what no file can hold, and no file name: an escaped NUL or half a surrogate."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            problem = "text with a character that cannot be written"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a word"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML speaks, wants 5.0e-4 and takes off, no, on and yes for truth values;
# people write 5e-4, and mean the words. A setting that is true or false understands them still.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not (tag == "tag:yaml.org,2002:bool" and first in "yYnNoO")
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return _unshared(yaml.load(text, _Loader))  # a SafeLoader: makes plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply, or within itself") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give a recipe file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: got bytes that are not UTF-8, expected a YAML recipe") from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: got {_kind(raw)}, expected a mapping of keys to values")
    return {str(key): value for key, value in raw.items()}


def _unshared(value: object) -> object:
    """A copy in which nothing is shared: an override of one key must not reach an alias of it."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key in ``raw``, making the mappings on the way where they are missing."""
    dotted, equals, text = override.partition("=")
    *parents, last = dotted.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"override: got {override!r}, expected key=value such as optim.lr=1e-4")
    for depth, key in enumerate(parents, start=1):
        if raw.get(key) is None:  # missing, or switched off: the override switches it on
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            where = ".".join(parents[:depth])
            raise UserError(
                f"override {override!r}: {where} is {_kind(raw)}, expected a mapping; "
                f"set {where} as a whole instead"
            )
    raw[last] = _parse_yaml(text, f"override {override!r}")


def _explain(kind: type, problem: ValidationError) -> str:
    """Word the first validation error as one line that names the dotted key."""
    error = problem.errors(include_url=False)[0]
    parents, section = _place(kind, error["loc"][:-1])
    if error["type"] in ("unexpected_keyword_argument", "dataclass_key_type"):
        name, known = str(error["loc"][-1]), _keys(section)
        where, choices = ".".join(parents) or "recipe", ", ".join(known)
        return f"{where}: got unknown key {_kind(name)}, expected {choices}{_nearest(name, known)}"
    key, got = ".".join(_place(kind, error["loc"])[0]) or "recipe", error["input"]
    if error["type"] == "missing":
        return f"{key}: got nothing, expected a value; add it to the recipe"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "literal_error":
        return f"{key}: got {_kind(got)}, expected {expected}{_nearest(got, _quoted(expected))}"
    if error["type"] in ("dataclass_type", "dict_type"):
        expected = "a mapping of keys to values"
    return f"{key}: got {_kind(got)}, expected {expected}"


def _place(kind: Any, location: Sequence[str | int]) -> tuple[list[str], Any]:  # noqa: ANN401
    """The dotted keys of pydantic's location, and the kind of what stands there.

    Pydantic adds the names of what it tried, such as ``float`` of ``float | int``; only parts that
    a person wrote are kept.
    """
    keys: list[str] = []
    for part in location:
        inner = _inner(_required(kind), part)
        if inner is not None and part != "[key]":
            keys.append(str(part) if str(part).isprintable() else _kind(str(part)))
            kind = inner
    return keys, _required(kind)


def _inner(kind: Any, part: str | int) -> Any:  # noqa: ANN401
    """The kind of one key or entry of a value of `kind`; None if there are none in it."""
    if is_dataclass(kind):
        return _hints(kind).get(str(part), str)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        return arguments[1]
    if origin in (list, tuple) and isinstance(part, int):
        return arguments[0]  # entries of one setting are all of one kind
    return None


def _required(kind: Any) -> Any:  # noqa: ANN401
    """``X`` of an annotated or optional ``X``."""
    if typing.get_origin(kind) is Annotated:
        return _required(typing.get_args(kind)[0])
    if isinstance(kind, types.UnionType):
        given = [one for one in typing.get_args(kind) if one is not types.NoneType]
        return _required(given[0]) if len(given) == 1 else kind
    return kind


def _hints(kind: Any) -> dict[str, Any]:  # noqa: ANN401
    """The kinds of the fields of a dataclass, by the keys that a file gives them."""
    known = typing.get_type_hints(kind)
    return dict(zip(_keys(kind), (known[field.name] for field in fields(kind)), strict=True))


def _keys(kind: Any) -> list[str]:  # noqa: ANN401
    """The keys of a section; a field whose name is a word of Python may have an alias."""
    return [getattr(field.default, "alias", None) or field.name for field in fields(kind)]


def _nearest(name: object, known: Sequence[str]) -> str:
    found = get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _kind(value: object) -> str:
    """Show a value on one line, or name the kind of one that is too long or too empty for it."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    shown = names.get(type(value), repr(value))
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."

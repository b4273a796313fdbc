"""What a run is made of: frozen dataclasses, read from a YAML recipe plus dotted overrides.

A recipe has the shape of :class:`TrainConfig`. Unknown keys are refused with the nearest known
one, so a typing error cannot silently train something else. Paths are relative to the folder in
which the command runs.
"""

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from bidistill.data.records import Role
from bidistill.errors import UserError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastSettings:
    """Adapters that listen to the forget set: see ``bidistill/contrastive.py``."""

    __pydantic_config__ = STRICT

    ridge: Positive = 0.03
    """Share of the mean input energy added in every direction; more of it trusts the data less."""
    input_rms: Positive = 3.0
    """Root mean square norm of what an adapter's A makes of the forget set's inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the linear layers of the model."""

    __pydantic_config__ = STRICT

    rank: AtLeastOne = 16
    alpha: Positive = 32
    """Scale: an adapter adds ``alpha / rank`` times its product."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LINEAR_LAYERS
    """Names of the linear layers that get an adapter."""
    layers: tuple[Count, Count] | None = None
    """First and last transformer layer that get adapters, both included; ``null`` is all."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    contrast: ContrastSettings | None = None
    """Choose A by what tells the forget set from the rest, and freeze it; ``null`` trains A."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the trained change that is exported; training overshoots, which costs neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model to change."""

    __pydantic_config__ = STRICT

    path: str
    """Folder with ``config.json``, a tokenizer and ``*.safetensors``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; trained weights are float32 always."""
    adapter: LoraSettings | None = field(default_factory=LoraSettings)
    """``null`` trains all weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Training records and how they are mixed."""

    __pydantic_config__ = STRICT

    train: Path
    """JSON lines file of records."""
    per_step: Annotated[dict[Role, Count], Field(min_length=1)]
    """Records of each role in every step."""
    max_answer_tokens: AtLeastOne | None = None
    """Longer answers are cut here; ``null`` keeps them whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Who shows the student what to answer, and what it is told before."""

    __pydantic_config__ = STRICT

    kind: Literal["base"] = "base"
    """``base`` is the model itself before training."""
    contexts: dict[Role, tuple[Message, ...]] = field(default_factory=dict)
    """Messages put before the question in the teacher's view, by role."""
    default_context: tuple[Message, ...] = ()
    """Messages for the roles that ``contexts`` does not name."""
    cache: bool = True
    """Compute the teacher's hidden rows once, before the first step, and keep them in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The loss of one role."""

    __pydantic_config__ = STRICT

    loss: Literal["bidirectional_kl", "push_pull", "jsd", "cross_entropy"]
    options: dict[str, float | int | str] = field(default_factory=dict)
    """Arguments of the loss function, such as ``forward: 0.5``."""
    weight: NonNegative = 1.0
    """Factor on every token of the role."""
    positions: Literal["answer", "first"] = "answer"
    """All tokens of the answer, or the first alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up, constant middle and linear decay."""

    __pydantic_config__ = STRICT

    lr: Positive = 5e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 3
    decay_fraction: Fraction = 0.5
    """Share of the steps, at the end, over which the rate falls to zero."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to at most this global norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__ = STRICT

    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objectives: dict[Role, ObjectiveConfig]
    """One loss for each role that takes part."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: AtLeastOne
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: AtLeastOne = 10
    """Steps between checkpoints."""
    keep_checkpoints: AtLeastOne = 2
    """Older checkpoints are deleted."""
    output: Path
    """Folder for checkpoints, logs and the trained model."""
    threads: AtLeastOne | None = None
    """CPU threads; ``null`` leaves the choice to PyTorch."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, apply ``a.b=value`` overrides in order and check the result.

    Args:
        path: YAML file with the keys of :class:`TrainConfig`.
        overrides: each a dotted key, ``=`` and a YAML value, such as ``optim.lr=1e-4``.

    Raises:
        UserError: the file cannot be read, a key is unknown or missing, a value is not of the
            kind expected, or a role is sampled without having an objective.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    try:
        config = _adapter().validate_python(raw)
    except ValidationError as error:
        raise UserError(_explain(error.errors(include_url=False)[0])) from None
    require_objectives(config)
    return config


def require_objectives(config: TrainConfig) -> None:
    """Refuse a configuration that samples a role without saying what to train it for.

    Raises:
        UserError: names the role.
    """
    for role, count in config.data.per_step.items():
        if count and role not in config.objectives:
            raise UserError(
                f"objectives: got none for role {role!r}, of which data.per_step takes {count}; "
                f"add objectives.{role}, or set data.per_step.{role} to 0"
            )


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration in plain types, ready for JSON or YAML."""
    return _adapter().dump_python(config, mode="json")


@cache
def _adapter() -> TypeAdapter[TrainConfig]:
    return TypeAdapter(TrainConfig)


class _Loader(yaml.SafeLoader):
    """YAML where ``5e-4`` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML speaks, wants 5.0e-4; people write 5e-4
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: makes plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None


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
    return {key: _unshared(value) for key, value in raw.items()}


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
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            where = ".".join(parents[:depth])
            raise UserError(
                f"override {override!r}: {where} is {_kind(raw)}, expected a mapping; "
                f"set {where} as a whole instead"
            )
    raw[last] = _parse_yaml(text, f"override {override!r}")


def _explain(error: ErrorDetails) -> str:
    """Word the first validation error as one line that names the dotted key."""
    # pydantic ends a location with what it tried: the key itself, or the kinds of an option
    location = [str(part) for part in error["loc"] if part not in ("[key]", "float", "int", "str")]
    key, got = ".".join(location) or "recipe", error["input"]
    if error["type"] == "unexpected_keyword_argument":
        *parents, name = location
        known = _known_keys(parents)
        where = ".".join(parents) or "recipe"
        choices = ", ".join(known)
        return f"{where}: got unknown key {name!r}, expected {choices}{_nearest(name, known)}"
    if error["type"] == "missing":
        return f"{key}: got nothing, expected a value; add it to the recipe"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "literal_error":
        return f"{key}: got {got!r}, expected {expected}{_nearest(got, _quoted(expected))}"
    if error["type"] in ("dataclass_type", "dict_type"):
        expected = "a mapping of keys to values"
    shown = _kind(got) if got is None or isinstance(got, dict | list) else repr(got)
    return f"{key}: got {shown}, expected {expected}"


def _known_keys(location: Sequence[str]) -> list[str]:
    """Names of the keys that the section at ``location`` may have."""
    kind: Any = TrainConfig
    for part in location:
        # below a mapping such as objectives, every key has the same kind of value
        kind = typing.get_type_hints(kind)[part] if is_dataclass(kind) else typing.get_args(kind)[1]
        if isinstance(kind, types.UnionType):  # "X | None"
            kind = typing.get_args(kind)[0]
    return [known.name for known in fields(kind)]


def _nearest(name: object, known: Sequence[str]) -> str:
    found = get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _kind(value: object) -> str:
    """Name the YAML kind of a value too long or too empty to show."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), repr(value))

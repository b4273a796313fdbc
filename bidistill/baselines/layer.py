"""The transformer block whose rows the losses of a run read, if they read one.

A step runs the model once and takes its rows in one place: after the last block, for the LM head,
or after the block that RMU names. So the losses of a run read the head, or one and the same layer.
That also keeps the ranks of a sharded run together: the backward of each goes through the same
blocks, whatever roles its share of a step has.
"""

from collections.abc import Mapping

from bidistill.config import ObjectiveConfig, TrainConfig
from bidistill.data.records import Role
from bidistill.errors import UserError
from bidistill.loading import settings_of
from bidistill.losses import find


def layer_of(configs: Mapping[Role, ObjectiveConfig]) -> int | None:
    """The number of the block, from 0; None where the losses read the LM head.

    Raises:
        UserError: some losses read another layer than the others, or the head.
    """
    chosen: dict[Role, object] = {}
    for role, config in configs.items():
        loss = find(config.loss)
        default = loss.options()["layer"].default if loss.reads == "layer" else None
        chosen[role] = config.options.get("layer", default) if loss.reads == "layer" else None
    (first, layer), *others = chosen.items() or [("", None)]
    for role, other in others:
        if other != layer:
            raise UserError(
                f"objectives.{role}: got a loss that reads {_said(other)} beside that of {first}, "
                f"which reads {_said(layer)}, expected one place for all; choose the same layer, "
                "or other losses"
            )
    return layer  # type: ignore


def check(config: TrainConfig) -> None:
    """Refuse a layer that the model lacks, and a teacher that cannot give its rows.

    Args:
        config: the recipe, whose options are checked already.

    Raises:
        UserError: names the key.
    """
    layer = layer_of(config.objectives)
    if layer is None:
        return
    teacher = config.teacher
    if teacher.kind != "base" or teacher.cache != "off":
        key, got = ("kind", teacher.kind) if teacher.kind != "base" else ("cache", teacher.cache)
        raise UserError(
            f"teacher.{key}: got {got} with a loss that reads a layer, expected a base teacher "
            "that runs in each step; set teacher.kind to base and teacher.cache to off"
        )
    depth = settings_of(config.model.path).get_text_config().num_hidden_layers
    if layer >= depth:
        role = next(iter(config.objectives))
        raise UserError(
            f"objectives.{role}.options: layer: got {layer}, expected 0 to {depth - 1}, the layers "
            "of this model; choose another for all roles"
        )


def _said(layer: object) -> str:
    return "the LM head" if layer is None else f"layer {layer}"

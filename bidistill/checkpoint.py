"""Checkpoints of a run: exact resume, safetensors and JSON only, never half written.

A checkpoint is a folder that appears under its final name when it is complete:

.. code-block:: text

    checkpoints/step-000010/
        weights.safetensors     trained parameters, fp32
        optimizer.safetensors   <parameter>/<exp_avg, exp_avg_sq, step>
        random.safetensors      states of torch's generators
        state.json              step, loader position, counters
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bidistill.errors import UserError
from bidistill.files import atomic_path, write_json

PATTERN = "step-*"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint and delete all but the latest ``keep``.

    Args:
        folder: where the checkpoints of a run lie.
        model: its trainable parameters are saved.
        optimizer: over exactly these parameters.
        state: what else resuming needs, as JSON; has ``step``, the number of steps done.
        keep: checkpoints that stay, this one included.

    Returns:
        The folder of the new checkpoint.
    """
    parameters = trainable(model)
    path = folder / f"step-{state['step']:06d}"
    if path.exists():  # complete, as only complete ones carry the name; the run came here before
        return path
    with atomic_path(path) as temporary:
        temporary.mkdir()
        save_file(_plain(parameters), temporary / "weights.safetensors")
        save_file(_plain(_moments(parameters, optimizer)), temporary / "optimizer.safetensors")
        save_file(_random_states(), temporary / "random.safetensors")
        write_json(temporary / "state.json", state)
    for old in sorted(folder.glob(PATTERN))[:-keep]:
        shutil.rmtree(old)
    return path


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    return max(folder.glob(PATTERN), default=None)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the state of a checkpoint back into model, optimiser and random generators.

    Returns:
        The ``state`` that :func:`save` was given.

    Raises:
        UserError: the checkpoint is damaged or holds other parameters than the model trains.
    """
    parameters = trainable(model)
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        random = load_file(path / "random.safetensors")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete this folder to resume from the one before"
        ) from None
    if weights.keys() != parameters.keys():
        odd = min(weights.keys() ^ parameters.keys())
        raise UserError(
            f"{path}: its parameters differ from the model's, for one {odd}; "
            "resume with the recipe that began this run"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    _restore_moments(parameters, optimizer, moments)
    _restore_random_states(random)
    return state


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached and contiguous on the CPU, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimiser's tensors as ``<parameter>/<key>``; none before the first update."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_moments(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    moments: Mapping[str, Tensor],
) -> None:
    """Hand the tensors back through ``load_state_dict``, which puts them on the right device."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in moments.items():
        name, _, key = full_name.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    order = {parameter: index for index, parameter in enumerate(_all_parameters(optimizer))}
    state = {order[parameters[name]]: entry for name, entry in by_name.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _all_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The optimiser's parameters in the order of its state dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random_states() -> dict[str, Tensor]:
    """States of torch's generators, one a device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`_random_states`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

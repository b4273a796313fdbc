r"""The gradient report: whether the roles pull the parameters in the same direction.

.. code-block:: text

    recipe --prepare--> model, batches --train_step--> ... every few steps, before the update:
        losses of the roles --> gradients --> cosines     (conflict.py)
                                         \--> transfer    (transfer.py)
    all measurements --> summary, report, plot

Training is the recipe's own: a measurement leaves parameters, modes and random numbers as they
were. Measured without dropout, on the examples of the step that is about to be taken.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from bidistill import about, checkpoint
from bidistill.config import ParallelConfig, TrainConfig, as_dict
from bidistill.data.loader import Batch
from bidistill.data.records import Role
from bidistill.diagnose.conflict import Measurement, measure, plain, summary
from bidistill.diagnose.conflict_report import markdown, sentence
from bidistill.errors import UserError
from bidistill.files import write_json, write_text
from bidistill.objectives import Objectives
from bidistill.prepare import prepare, sampled
from bidistill.progress import say, track
from bidistill.update import Part, forward, make_optimizer, train_step
from bidistill.world import World

NAME = "gradients"
"""Of the three files."""


def run(
    config: TrainConfig, out_dir: Path | str, *, every: int = 5, steps: int | None = None
) -> dict[str, Any]:
    """Train by a recipe, measure, and write ``gradients.json``, ``.md`` and ``.svg``.

    Nothing is exported or checkpointed, and ``config.output`` is not touched.

    Args:
        config: the recipe.
        out_dir: folder for the files; created if missing.
        every: steps between two measurements; the first is before the first step.
        steps: stop after so many; None: all of the recipe's. Its schedule does not change.

    Returns:
        What ``gradients.json`` holds.

    Raises:
        UserError: something in the recipe or the files it names cannot be used, fewer than two
            roles are trained, or matplotlib is missing.
    """
    roles = sampled(config)
    _check(roles)
    count = config.steps if steps is None else min(steps, config.steps)
    found = _train(config, count, every)
    result = {
        "recipe": as_dict(config),
        "versions": about.versions(),
        "commit": about.commit(),
        "steps": count,
        "every": every,
        "roles": roles,
        **summary(found, roles),
        "measurements": [plain(one, roles) for one in found],
    }
    _write(Path(out_dir), result)
    return result


def _check(roles: list[Role]) -> None:
    """Refuse before anything slow begins."""
    if len(roles) < 2:
        raise UserError(
            f"data.per_step: got examples of {len(roles)} role, expected at least two to compare; "
            "give another role a count"
        )
    if find_spec("matplotlib") is None:
        raise UserError(
            "gradients: got no matplotlib, expected it for the picture; run pip install matplotlib"
        )


def _train(config: TrainConfig, count: int, every: int) -> list[Measurement]:
    """Take the steps of the recipe, and measure before every so many."""
    # this is one process, and nothing comes of it that would be guarded
    config = replace(config, parallel=ParallelConfig(), guard=None)
    model, _, loader, objectives, teacher, _ = prepare(config, World())
    parameters = list(checkpoint.trainable(model).values())
    optimizer = make_optimizer(parameters, config.optim)
    apart = Objectives(
        config.objectives, objectives.transform, sampled(config), objectives.teacher_transform
    )
    found = []
    for step, (batch, _) in enumerate(track(islice(loader, count), count, NAME)):
        if step % every == 0:
            model.eval()  # dropout would make two looks at one loss differ

            def losses_of(batch: Batch = batch) -> Mapping[Role, Tensor]:
                part = Part(batch, apart)
                return forward(config, model, teacher, part).role_losses

            found.append(measure(losses_of, parameters, step))
        model.train()
        train_step(config, model, optimizer, objectives, teacher, batch, step)
    return found


def _write(out_dir: Path, result: dict[str, Any]) -> None:
    """Each file as a whole or not at all, and the sentence to standard output."""
    from bidistill.diagnose.conflict_plot import draw  # slow to import

    draw(out_dir / f"{NAME}.svg", result)
    write_json(out_dir / f"{NAME}.json", result)
    write_text(out_dir / f"{NAME}.md", markdown(result, f"{NAME}.svg"))
    say(sentence(result["overall"]))
    say(f"report: {out_dir / NAME}.md")

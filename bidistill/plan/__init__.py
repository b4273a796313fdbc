"""What memory a run takes, before any weight is loaded: ``bidistill plan``.

The trainer's own step runs on tensors that have shapes and no memory (`step`), followed by a mode
that counts what is allocated (`tracker`), on the longest part of a step that the loader will give
(`longest`). How steps are cut so that they fit is found by trying (`choose`). docs/memory.md says
how close that comes.
"""

import math
import os
from dataclasses import replace

from bidistill.config import TrainConfig
from bidistill.data.store import Selection
from bidistill.errors import UserError
from bidistill.loading import load_tokenizer
from bidistill.plan.choose import BF16, Planner
from bidistill.plan.table import as_json, as_text
from bidistill.prepare import check, sampled
from bidistill.progress import say
from bidistill.teacher import model as teacher_model
from bidistill.teacher.compute import examples_of

HEADROOM = 0.05
"""Share of a device's memory that is left alone: the driver's own, and what the allocator cannot
fill."""


def main(
    config: TrainConfig, *, ranks: int, memory_gib: float, target: str, in_json: bool = False
) -> bool:
    """Plan a run; print what a rank holds, how to cut its steps, and what to change if none fits.

    Args:
        config: the recipe.
        ranks: processes of the run.
        memory_gib: of the device of one rank.
        target: ``cuda`` or ``cpu``.
        in_json: print JSON instead of a table.

    Returns:
        Whether it fits.

    Raises:
        UserError: something in the recipe or the files it names cannot be used, or not with so
            many ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("plan: got several ranks, expected one; leave torchrun out, give --world")
    if not math.isfinite(memory_gib):
        raise UserError(
            f"--gpu-mem: got {memory_gib}, expected GiB of one device; give a number such as 80"
        )
    if target == "cuda":
        config = _plain(config)
    check(config)
    tokenizer = load_tokenizer(config.model.path)
    teacher_model.check_vocabulary(config, tokenizer)
    store = examples_of(config, tokenizer)
    planner = Planner(Selection(store, sampled(config)), ranks, target)
    limit = int(memory_gib * (1 - HEADROOM) * 2**30)
    given = planner.plan(config)
    chosen = planner.choose(config, limit)
    fits = chosen.memory.total <= limit
    changes = [] if fits else planner.advise(chosen, limit)
    say((as_json if in_json else as_text)(given, chosen, changes, limit))
    return fits


def _plain(config: TrainConfig) -> TrainConfig:
    """The recipe without what runs on an accelerator alone, as none need be here.

    Raises:
        UserError: it could not have it on any.
    """
    model = config.model
    if model.attention == "flash" and model.dtype != BF16:
        raise UserError(
            f"model.attention: got flash with model.dtype {model.dtype}, expected {BF16}; change "
            "that, or set model.attention to auto"
        )
    return replace(config, model=replace(model, attention="auto", liger=False))

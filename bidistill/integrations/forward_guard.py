"""Whether an attached model still runs the forward that `attach` gave it.

Whoever replaces ``model.forward`` later, as Liger's patches do, would leave one that swallows the
teacher's part of a batch and returns a plain cross-entropy. A hook refuses that before it runs.
"""

from typing import Any

import torch
from torch import nn

from bidistill.errors import UserError
from bidistill.integrations.attached import DISPATCH, STATE

OURS = "runs_bidistill"
"""Attribute of our forwards; whatever is put around one by ``functools.wraps`` has it too."""


def refuse_lost_forward(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attached model, and of the model within a PeftModel.

    Args:
        model: whose forward is about to be called.
        args: left alone.
        kwargs: left alone.

    Raises:
        UserError: the loss would not be run, or not where it should.
    """
    if getattr(model, "_is_replica", False):
        raise UserError(
            "model: got a replica of nn.DataParallel, expected one process for each device; start "
            "with torchrun, or let the process see one device only"
        )
    if kwargs.get(DISPATCH) is not None and not runs_ours(model):
        given: nn.Module = vars(model)[STATE].model
        if given is not model:
            raise UserError(
                f"model: got the {type(model).__name__} within the {type(given).__name__} that was "
                "attached, expected that one; call that, or detach(model) and attach(model), such "
                "as after merge_and_unload()"
            )
        raise UserError(
            f"model.forward: got another one than attach() gave this {type(model).__name__}, whose "
            f"loss would not be that of {DISPATCH}, expected it; attach after whatever replaces "
            "forwards (use_liger_kernel=False, keep_fp32_wrapper=True)"
        )


@torch.compiler.assume_constant_result  # a compiler cannot look into what wraps a forward
def runs_ours(model: nn.Module) -> bool:
    """Whether the forward of this very object is ours, or around ours, such as autocast."""
    forward = vars(model).get("forward")
    while forward is not None and not hasattr(forward, OURS):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None

"""What a provider is: someone who turns a problem into a step.

A step is one forward and backward, which returns the loss and the gradients that the case wants.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import Problem

Result = tuple[Tensor, list[Tensor]]
Loss = Callable[[Problem], Tensor]


class Provider(NamedTuple):
    """One column of the comparison."""

    name: str
    loss: str
    """What it computes, the closest it has to the case's loss."""
    build: Callable[[Problem], Callable[[], Result | None]]
    checked: bool = True


class NotInstalled(Exception):
    """Something that this installation or this machine does not have."""


class NotOffered(Exception):
    """Something that a project has no function for."""


def by_autograd(loss: Loss, problem: Problem) -> Callable[[], Result]:
    """Return the step of a loss that autograd differentiates."""

    def step() -> Result:
        if problem.case.mode == "no_grad":
            with torch.no_grad():
                return loss(problem), []
        value = loss(problem)
        return value, list(torch.autograd.grad(value, problem.wanted))

    return step

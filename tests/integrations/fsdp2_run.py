"""What each rank does in the tests of examples/fsdp2.py."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from bidistill.distributed import whole
from bidistill.world import World, join
from bidistill_kernels import linear_bidirectional_kl
from examples import fsdp2
from examples.tiny import make_pairs
from tests.trainer.cut import double


class Outcome(NamedTuple):
    """What a run gave, whole tensors on the CPU."""

    losses: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    """Of the last step."""


def train(tied: bool, accumulate: int, world: World | None = None) -> Outcome:
    """Three steps of plain gradient descent in fp64: weights show each error of a gradient."""
    world = world or join()
    student, teacher = fsdp2.build(world, tied, prepare=double)
    return _descend(student, teacher, accumulate, world)


def train_in_bf16(cast_forward_inputs: bool) -> Outcome:
    """The same with bf16 compute over fp32 masters."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=cast_forward_inputs,
    )
    student, teacher = fsdp2.build(join(), policy=policy)
    return _descend(student, teacher, 2, join())


def _descend(student, teacher, accumulate: int, world: World) -> Outcome:
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    losses = [
        fsdp2.train_step(student, teacher, optimizer, make_pairs(7), world, accumulate)
        for _ in range(3)
    ]
    named = dict(student.named_parameters())
    return Outcome(
        losses,
        {name: whole(p.detach()) for name, p in named.items()},
        {name: whole(p.grad) for name, p in named.items()},
    )


def read_the_head_outside() -> str:
    """What the loss says of a weight that nobody has gathered."""
    student, _ = fsdp2.build(join())
    hidden = torch.zeros(1, 64)
    weight = student.lm_head.weight
    try:
        linear_bidirectional_kl(hidden, weight, hidden, weight)
    except TypeError as error:
        return str(error)
    return "nothing"

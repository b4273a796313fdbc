"""What each rank does in the tests of examples/fsdp2.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from bidistill.config import LoraSettings
from bidistill.distributed import reduce_gradients, whole
from bidistill.integrations.attach import attach
from bidistill.integrations.collator import PairCollator
from bidistill.models import add_adapter, attach_distill_step
from bidistill.world import World, join
from bidistill_kernels import linear_bidirectional_kl
from examples import fsdp2
from examples.tiny import make_pairs, tiny_llama
from tests.trainer.cut import double
from tests.trainer.tiny import randomise_adapters


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
    return _outcome(losses, dict(student.named_parameters()))


def _outcome(losses: list[float], named: dict[str, Any]) -> Outcome:
    return Outcome(
        losses,
        {name: whole(p.detach()) for name, p in named.items()},
        {name: whole(p.grad) for name, p in named.items()},
    )


def train_adapter(way: str, accumulate: int, world: World | None = None) -> Outcome:
    """The same with LoRA, whose teacher is the model without it; by a pack, or by `attach`."""
    world = world or join()
    model: Any = add_adapter(tiny_llama(), LoraSettings(rank=2, targets=("q_proj", "down_proj")))
    randomise_adapters(model)
    double(model)
    if way == "attach":
        attach(model)
    else:
        attach_distill_step(model)
    if world.size > 1:
        share_out(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        pairs = make_pairs(7)
        count = sum(len(pair["answer_ids"]) for pair in pairs)
        mine, total = pairs[world.rank :: world.size], 0.0
        for part in range(accumulate):
            reduce_gradients(model, after=part == accumulate - 1)
            divisor = count / world.size
            if way == "attach":
                batch = PairCollator(padding=1)(mine[part::accumulate])
                loss = model(**batch, num_items_in_batch=divisor).loss
            else:
                student, teacher = fsdp2.packs(mine[part::accumulate])
                loss = model.distill_step(student, fsdp2.fused_kl(student.target, divisor), teacher)
            loss.backward()
            total += loss.item() / world.size
        optimizer.step()
        losses.append(world.sum([total]).item())
    return _outcome(losses, trained)


def attach_shared_out(who: str, reshard: bool | None, shared: bool = True) -> Outcome:
    """Two steps where ``who``, student or teacher, was shared out, its head too, before `attach`.

    Args:
        who: which one.
        reshard: whether units are cut up after their forward, the root's too.
        shared: else whole, to compare with.
    """
    student, teacher = tiny_llama(tied=False), tiny_llama(tied=False)
    teacher.model.norm.weight.data *= 1.5
    model = {"student": student, "teacher": teacher}[who]
    for each in (student, teacher):
        double(each)
    if shared:
        for unit in (*model.model.layers, model.lm_head, model):
            fully_shard(unit, reshard_after_forward=reshard)
    attach(student, teacher=teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    losses = []
    for pairs in (make_pairs(3), make_pairs(5)):
        optimizer.zero_grad()
        loss = student(**PairCollator(padding=1)(pairs)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return _outcome(losses, dict(student.named_parameters()))


def share_out(model: Any) -> None:
    """As `fsdp2.shard`, of a model with adapters."""
    base, policy = model.get_base_model(), fsdp2.POLICY
    for layer in base.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if hasattr(model, "distill_step"):
        register_fsdp_forward_method(model, "distill_step")


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

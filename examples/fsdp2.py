"""Distillation in a plain FSDP2 loop, the fused loss inside the forward of the LM head.

``torchrun --nproc-per-node 2 examples/fsdp2.py``; alone, ``python examples/fsdp2.py`` gives the
same weights from one process.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.data.packing import Packed, pack
from bidistill.data.views import View
from bidistill.distributed import put_back, reduce_gradients
from bidistill.models import attach_distill_step
from bidistill.teacher.rows import TeacherRows
from bidistill.world import World, join
from bidistill_kernels import linear_bidirectional_kl
from examples.tiny import Pair, eager_kl, make_pairs, tiny_llama

POLICY = MixedPrecisionPolicy(cast_forward_inputs=False)
"""For bf16: param_dtype=torch.bfloat16, reduce_dtype=torch.float32."""


def packs(pairs: list[Pair]) -> tuple[Packed, Packed]:
    """All pairs on one token axis, as the student and as the teacher reads them."""

    def side(key: str) -> Packed:
        return pack([(View(pair[key], key), pair["answer_ids"]) for pair in pairs])

    return side("prompt_ids"), side("teacher_prompt_ids")


def shard(model: Any, policy: MixedPrecisionPolicy) -> None:  # noqa: ANN401
    """Share a model out: a unit for each block, one for an untied head, the root for the rest."""
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        # it is read right after it is gathered, and again in the backward that follows
        fully_shard(model.lm_head, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mp_policy=policy)
    for method in ("distill_step", "own_rows"):  # whatever runs the model from outside
        register_fsdp_forward_method(model, method)


def fused_kl(target: Tensor, divisor: float) -> Callable[..., Float[Tensor, ""]]:
    """A loss as ``distill_step`` calls it: from hidden rows and heads, never from logits."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherRows) -> Tensor:
        return linear_bidirectional_kl(
            hidden,
            weight,
            teacher.hidden,
            teacher.weight,
            target.to(hidden.device),
            student_bias=bias,
            teacher_bias=teacher.bias,
            num_items=divisor,
        )

    return loss


def train_step(
    model: Any,  # noqa: ANN401
    teacher: Any,  # noqa: ANN401
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    world: World,
    accumulate: int = 1,
) -> float:
    """One update by all ranks, each with every `world.size`-th pair, in `accumulate` parts.

    Returns:
        The mean over all answer tokens of the step, nats, before the update.
    """
    mine = pairs[world.rank :: world.size]
    parts = [mine[part::accumulate] for part in range(accumulate)]
    # counted before the first part, over all ranks: so the cut into parts and ranks is not seen
    (count,) = world.sum([sum(len(pair["answer_ids"]) for pair in mine)]).tolist()
    optimizer.zero_grad()
    total = 0.0
    for part in parts:
        reduce_gradients(model, after=part is parts[-1])  # model.set_requires_gradient_sync
        student_pack, teacher_pack = packs(part)
        rows = teacher.own_rows(teacher_pack, head=True)
        # FSDP averages the gradients of the ranks, the loss is a sum over them
        loss = fused_kl(student_pack.target, count / world.size)
        loss = model.distill_step(student_pack, loss, rows)
        loss.backward()
        total += loss.item() / world.size
        put_back(teacher)  # no backward frees what its forward gathered
    optimizer.step()
    return world.sum([total]).item()


def build(
    world: World,
    tied: bool = False,
    policy: MixedPrecisionPolicy = POLICY,
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> tuple[Any, Any]:
    """A student and its frozen copy, with their root methods, shared out if there are ranks."""
    student = tiny_llama(tied=tied)
    teacher = copy.deepcopy(student).requires_grad_(False)
    for model in (student, teacher):
        prepare(model)
        attach_distill_step(model)
        if world.size > 1:
            shard(model, policy)
    return student, teacher


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the fused loss in one process, to be called again and again."""
    return _step(fused_kl)


def eager_step() -> Callable[[], Tensor]:
    """The same packs, and full logits of all rows at once."""

    def eager(target: Tensor, divisor: float) -> Callable[..., Tensor]:
        def loss(hidden: Tensor, weight: Tensor, bias: None, teacher: TeacherRows) -> Tensor:
            s = (hidden @ weight.T).log_softmax(-1)
            t = (teacher.hidden @ teacher.weight.T).log_softmax(-1)  # type: ignore
            return (0.5 * (t.exp() - s.exp()) * (t - s)).sum() / divisor

        return loss

    return _step(eager)


def _step(make_loss: Callable) -> Callable[[], Tensor]:
    student, teacher = build(World())
    student_pack, teacher_pack = packs(make_pairs())
    loss = make_loss(student_pack.target, len(student_pack.target))

    def step() -> Tensor:
        rows = teacher.own_rows(teacher_pack, head=True)
        value = student.distill_step(student_pack, loss, rows)
        value.backward()
        return value.detach()

    return step


def main() -> None:
    """Train for a few steps."""
    world, pairs = join(), make_pairs()
    whole = tiny_llama(tied=False)
    expected = eager_kl(whole, whole, pairs).item()
    student, teacher = build(world)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = [train_step(student, teacher, optimizer, pairs, world, 2) for _ in range(5)]
    assert abs(losses[0] - expected) < 1e-5 * expected, (losses[0], expected)
    assert losses[-1] < losses[0], losses
    if world.first:
        print(f"ranks {world.size}, nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")


if __name__ == "__main__":
    main()

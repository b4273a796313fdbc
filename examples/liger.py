"""Distil one model into another with Liger's loss, by our kernels: only the import is changed.

python examples/liger.py
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.liger import LigerFusedLinearJSD  # was: liger_kernel.transformers
from bidistill_kernels import jsd_reference
from examples.tiny import make_pairs, step_of, tiny_llama

BETA = 0.5
STEPS = 20


def make_batch() -> tuple[Integer[Tensor, "B T"], Integer[Tensor, "B T"]]:
    """Ids, and labels that are -100 on prompts and padding."""
    ids, labels = list[Tensor](), list[Tensor]()
    for pair in make_pairs():
        prompt, answer = pair["prompt_ids"], pair["answer_ids"]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    # to the right, where a causal model does not look
    return pad_sequence(ids, True, 1), pad_sequence(labels, True, -100)


def fused_loss(student: PreTrainedModel, teacher: PreTrainedModel) -> Float[Tensor, ""]:
    """As one writes it with Liger: hidden states and heads, shifted labels."""
    ids, labels = make_batch()
    hidden = student.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    with torch.no_grad():
        target = teacher.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    heads = student.lm_head.weight, teacher.lm_head.weight
    jsd = LigerFusedLinearJSD(jsd_beta=BETA)
    return jsd(hidden, heads[0], target, heads[1], labels[:, 1:].flatten())


def eager_loss(student: PreTrainedModel, teacher: PreTrainedModel) -> Float[Tensor, ""]:
    """The same from full logits."""
    ids, labels = make_batch()
    logits = student(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    counts = labels[:, 1:].flatten() != -100
    return jsd_reference(logits, target, beta=BETA)[counts].mean()


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward with the fused loss, to be timed."""
    return _step(fused_loss)


def eager_step() -> Callable[[], Tensor]:
    """One forward and backward from full logits, to be timed beside it."""
    return _step(eager_loss)


def _step(objective: Callable[..., Tensor]) -> Callable[[], Tensor]:
    student, teacher = tiny_llama(0), tiny_llama(1)
    return step_of(lambda: objective(student, teacher))


def main() -> tuple[float, float]:
    """Train a few steps; the first and the last loss."""
    student, teacher = tiny_llama(0), tiny_llama(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    torch.testing.assert_close(fused_loss(student, teacher), eager_loss(student, teacher))
    losses = list[float]()
    for _ in range(STEPS):
        loss = fused_loss(student, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], "the student does not learn"
    print(f"JSD, nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} after {STEPS} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

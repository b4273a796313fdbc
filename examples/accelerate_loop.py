"""Distillation in a plain loop with accelerate: full fine-tuning towards a frozen copy.

A step is a few batches; its loss is the sum over all their answer tokens, on all processes, divided
by the number of them. Run it with ``python examples/accelerate_loop.py``; with
``accelerate launch`` it is data parallel.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.attach import attach
from bidistill.integrations.collator import PairCollator
from examples.tiny import Pair, batch_kl, eager_kl, make_pairs, step_of, tiny_llama

ROUNDS = 10


def train(pairs: list[Pair], batch_size: int = 4, batches: int = 2) -> tuple[list[float], Tensor]:
    """Train on ``pairs``; return the loss of each step, and the weights as one vector."""
    accelerator = Accelerator()
    teacher = tiny_llama().to(accelerator.device).eval()
    student = attach(tiny_llama(), teacher=teacher)
    loader = DataLoader(pairs, batch_size, collate_fn=PairCollator(student.config.pad_token_id))  # type: ignore
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)

    losses = list[float]()
    for _ in range(ROUNDS):
        waiting = list(loader)
        for start in range(0, len(waiting), batches):
            step = waiting[start : start + batches]
            count = sum((batch["labels"] != -100).sum() for batch in step)
            count = accelerator.reduce(count, "sum")
            total = torch.zeros((), device=accelerator.device)
            for batch in step:
                last = batch is step[-1]
                with nullcontext() if last else accelerator.no_sync(model):
                    loss = model(**batch, num_items_in_batch=count).loss
                    # DDP takes the mean over processes, and the count is that of all of them
                    accelerator.backward(loss * accelerator.num_processes)
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(total, "sum")))  # type: ignore
    weights = torch.nn.utils.parameters_to_vector(student.parameters()).detach()
    return losses, weights


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the attached model."""
    student = attach(tiny_llama(), teacher=tiny_llama(seed=1).eval())
    batch = PairCollator(student.config.pad_token_id)(make_pairs())  # type: ignore
    return step_of(lambda: student(**batch).loss)


def eager_step() -> Callable[[], Tensor]:
    """The same from full logits of the same padded batch."""
    student, teacher = tiny_llama(), tiny_llama(seed=1).eval()
    batch = PairCollator(student.config.pad_token_id)(make_pairs())  # type: ignore
    return step_of(lambda: batch_kl(student, teacher, batch))


def main() -> None:
    """Train, and show that the losses are those of full logits."""
    pairs = make_pairs()
    losses, _ = train(pairs)
    first = eager_kl(tiny_llama(), tiny_llama(), pairs).item()
    assert abs(losses[0] - first) < 1e-4 * first, f"first loss {losses[0]}, from logits {first}"
    assert losses[-1] < 0.7 * losses[0], "the loss did not fall"
    print(f"loss before {losses[0]:.4f} nats per answer token, after {losses[-1]:.4f}")


if __name__ == "__main__":
    main()

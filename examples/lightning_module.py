"""Distillation with Lightning: a module and a stock Trainer.

``python examples/lightning_module.py``.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.collator import PairCollator
from bidistill.integrations.lightning import DistillationModule
from examples.tiny import batch_kl, eager_kl, make_pairs, step_of, tiny_llama


class Losses(Callback):
    """Keeps what was logged of each batch."""

    def __init__(self) -> None:
        """Start with none."""
        self.values = list[float]()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Take the loss of the batch."""
        self.values.append(trainer.callback_metrics["train_loss"].item())


def module() -> DistillationModule:
    """The student, told apart from its teacher by what they read."""
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return DistillationModule(tiny_llama(), optimizer, teacher=tiny_llama())


def loader(batch_size: int) -> DataLoader:
    """Pairs in padded batches."""
    return DataLoader(make_pairs(), batch_size, collate_fn=PairCollator(padding=1))  # type: ignore


def trainer(**options: Any) -> Trainer:  # noqa: ANN401
    """One without files and bars."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Trainer(**quiet | options)  # type: ignore


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the module's loss, to be called again and again."""
    distilled = module()
    (batch,) = loader(8)
    return step_of(lambda: distilled.model(**batch).loss)


def eager_step() -> Callable[[], Tensor]:
    """The same from full logits."""
    student, teacher = tiny_llama(), tiny_llama()
    (batch,) = loader(8)
    return step_of(lambda: batch_kl(student, teacher, batch))


def main() -> None:
    """Train for a few steps, each on all pairs in two batches."""
    expected = eager_kl(tiny_llama(), tiny_llama(), make_pairs()[:4]).item()
    losses = Losses()
    trainer(max_epochs=5, accumulate_grad_batches=2, callbacks=[losses]).fit(module(), loader(4))
    assert abs(losses.values[0] - expected) < 1e-5 * expected, (losses.values[0], expected)
    assert losses.values[-2] < losses.values[0], losses.values
    print(f"nats per token: {losses.values[0]:.4f} before, {losses.values[-2]:.4f} after")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")  # advice on workers and validation
    main()

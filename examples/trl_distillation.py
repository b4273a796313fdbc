"""Train by TRL's DistillationTrainer with the fused divergence: only the import is changed.

.. code-block:: text

    python examples/trl_distillation.py
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback
from trl import DistillationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.trl import DistillationTrainer  # was: from trl
from examples.tiny import (
    as_words,
    eager_divergence,
    make_batch,
    make_pairs,
    step_of,
    tiny_llama,
    word_tokenizer,
)

STEPS = 12


def make_trainer(
    folder: str,
    kind: type = DistillationTrainer,
    adapter: LoraConfig | None = None,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A trainer that samples a few tokens and compares them with another model's."""
    config = {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "beta": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    trainer = kind(
        model=tiny_llama(0),
        teacher_model=tiny_llama(1),
        args=DistillationConfig(**{**config, **options}),
        train_dataset=Dataset.from_list(
            [{"prompt": as_words(pair["prompt_ids"])} for pair in make_pairs()]
        ),
        processing_class=word_tokenizer(),
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def eager_loss(trainer: Any, batch: dict[str, Tensor]) -> Float[Tensor, ""]:  # noqa: ANN401
    """The trainer's loss from full logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    K, counts = batch["completion_ids"].shape[1], batch["completion_mask"].flatten() != 0

    def logits(model: torch.nn.Module) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return out[:, -K - 1 : -1].flatten(0, 1)[counts] / trainer.temperature

    student = logits(trainer.model)
    with torch.no_grad():
        teacher = logits(trainer.teacher_model)
    return eager_divergence(student, teacher, trainer.beta).mean()


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the trainer's loss, to be timed."""
    return _step(DistillationTrainer)


def eager_step() -> Callable[[], Tensor]:
    """The same of TRL's own class, to be timed beside it."""
    return _step(trl.DistillationTrainer)


def _step(kind: type) -> Callable[[], Tensor]:
    trainer, batch = make_trainer(tempfile.mkdtemp(), kind), make_batch()
    return step_of(lambda: trainer.compute_loss(trainer.model, batch))


def main() -> tuple[float, float]:
    """Train a few steps; the first and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = make_trainer(folder), make_batch()
        loss = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(loss, eager_loss(trainer, batch))
        trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    first, last = (line["loss"] for line in (logged[0], logged[-1]))
    assert last < first, "the student does not learn"
    entropy = [line["entropy"] for line in (logged[0], logged[-1])]
    print(f"KL, nats per token: {first:.4f} before, {last:.4f} after {STEPS} steps")
    print(f"entropy of the student, nats: {entropy[0]:.4f} before, {entropy[1]:.4f} after")
    return first, last


if __name__ == "__main__":
    main()

"""Distillation in the stock `transformers.Trainer`: one line, and a collator of pairs.

The student answers without the context that its teacher, itself without the adapter, has read.
Run it with ``python examples/hf_trainer.py``; under ``torchrun`` it is data parallel.

Legend: B pairs, N answer tokens, V vocabulary.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.attach import attach
from bidistill.integrations.collator import PairCollator
from examples.tiny import batch_logits, eager_kl, make_pairs, tiny_llama


def adapted() -> PeftModel:
    """The student: a random Llama with LoRA."""
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(tiny_llama(), settings)  # type: ignore


def make_trainer(
    folder: str, model: torch.nn.Module, kind: type[Trainer] = Trainer, **arguments: object
) -> Trainer:
    """A Trainer of eight pairs, all of them in one step."""
    given: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # the collator needs them all
    }
    return kind(
        model=model,
        args=TrainingArguments(**given | arguments),
        train_dataset=make_pairs(),  # type: ignore
        data_collator=PairCollator(model.config.pad_token_id),  # type: ignore
    )


class EagerTrainer(Trainer):
    """What it takes without the fused loss: the logits of both models, whole and in fp32."""

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Half of each KL divergence, over the answer tokens."""
        student = batch_logits(model, inputs).log_softmax(-1)
        with torch.no_grad(), model.disable_adapter():
            teacher = batch_logits(model, inputs, "teacher_").log_softmax(-1)
        ratio = teacher - student
        loss = 0.5 * ((teacher.exp() - student.exp()) * ratio).sum()
        return loss / (len(student) if num_items_in_batch is None else num_items_in_batch)


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the Trainer with the fused loss."""
    return _step(attach(adapted()), Trainer)


def eager_step() -> Callable[[], Tensor]:
    """The same from full logits."""
    return _step(adapted(), EagerTrainer)


def _step(model: PeftModel, kind: type[Trainer]) -> Callable[[], Tensor]:
    trainer = make_trainer(tempfile.mkdtemp(), model, kind)
    batch = trainer.data_collator(make_pairs())
    count = (batch["labels"] != -100).sum()
    return lambda: trainer.training_step(trainer.model, dict(batch), count)  # type: ignore


def losses(trainer: Trainer) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train, and show that the losses are those of full logits."""
    with tempfile.TemporaryDirectory() as folder:
        found = losses(make_trainer(folder, attach(adapted())))
    first = eager_kl(tiny_llama(), tiny_llama(), make_pairs()).item()
    assert abs(found[0] - first) < 1e-4 * first, f"first loss {found[0]}, from logits {first}"
    assert found[-1] < 0.7 * found[0], "the loss did not fall"
    print(f"loss before {found[0]:.4f} nats per answer token, after {found[-1]:.4f}")


if __name__ == "__main__":
    main()

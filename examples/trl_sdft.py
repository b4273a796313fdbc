"""Train by TRL's SDFTTrainer without full logits: only the import is changed.

.. code-block:: text

    python examples/trl_sdft.py
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback
from trl.experimental import sdft

sys.path.insert(0, str(Path(__file__).parents[1]))

from bidistill.integrations.trl_sdft import SDFTTrainer  # was: from trl.experimental.sdft
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
    kind: type = SDFTTrainer,
    adapter: LoraConfig | None = None,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """A trainer whose teacher is the first model, and reads a context before the prompt."""
    config = {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "num_generations": 1,
        "max_completion_length": 6,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "distillation_mode": "full_logits",
        "teacher_prompt_template": "{privileged_context} {prompt}",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    model = tiny_llama()
    model.save_pretrained(folder)  # TRL loads the teacher from where the student came from
    model.config._name_or_path = folder
    rows = [
        {
            "prompt": as_words(pair["prompt_ids"]),
            "privileged_context": as_words(pair["teacher_prompt_ids"][: -len(pair["prompt_ids"])]),
        }
        for pair in make_pairs()
    ]
    trainer = kind(
        model=model,
        args=sdft.SDFTConfig(**{**config, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def eager_loss(trainer: Any, batch: dict[str, Tensor]) -> Float[Tensor, ""]:  # noqa: ANN401
    """The trainer's loss from full logits, for ``full_logits``."""
    mask = batch["completion_mask"]
    (B, K), counts = mask.shape, mask.flatten() != 0

    def logits(model: torch.nn.Module, ids: Tensor, attended: Tensor) -> Tensor:
        out = model(input_ids=ids, attention_mask=attended, use_cache=False).logits
        return out[:, -K - 1 : -1].flatten(0, 1)[counts] / trainer.temperature

    student = logits(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], mask], 1),
    )
    with torch.no_grad():
        seen = batch["teacher_input_ids"], batch["teacher_attention_mask"]
        teacher = logits(trainer.teacher_model, *seen)
    rows = eager_divergence(student, teacher, trainer.args.distillation_alpha)
    return (rows / mask.sum(1).repeat_interleave(K)[counts]).sum() / B


def fused_step() -> Callable[[], Tensor]:
    """One forward and backward of the trainer's loss, to be timed."""
    return _step(SDFTTrainer)


def eager_step() -> Callable[[], Tensor]:
    """The same of TRL's own class, to be timed beside it."""
    return _step(sdft.SDFTTrainer)


def _step(kind: type) -> Callable[[], Tensor]:
    trainer, batch = make_trainer(tempfile.mkdtemp(), kind), make_batch()
    trainer.current_gradient_accumulation_steps = 1  # which train() sets
    return step_of(lambda: trainer.compute_loss(trainer.model, batch))


def main() -> tuple[float, float]:
    """Train a few steps; the first and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, batch = make_trainer(folder), make_batch()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(loss, eager_loss(trainer, batch))
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0], "the student does not learn"
    print(f"JSD, nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} after {STEPS} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

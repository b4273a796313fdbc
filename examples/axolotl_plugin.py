"""What axolotl does with the plugin, step by step, in its order and with its own plugin manager.

Model and pairs are made here, so ``base_model`` and ``path`` of the YAML file are not read.

.. code-block:: text

    python examples/axolotl_plugin.py
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from axolotl.datasets import TokenizedPromptDataset
from axolotl.integrations.base import PluginManager
from axolotl.prompt_strategies import load
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.tiny import eager_kl, make_pairs, tiny_llama, word_tokenizer

CONFIG = Path(__file__).parent / "axolotl.yaml"


def make_trainer(folder: str, cfg: DictDefault | None = None) -> Trainer:
    """From the YAML file to a trainer; axolotl's own builds on transformers' likewise."""
    cfg = DictDefault(yaml.safe_load(CONFIG.read_text())) if cfg is None else cfg
    manager = PluginManager.get_instance()
    for name in cfg.plugins:
        manager.register(name)
    manager.pre_model_load(cfg)

    tokenizer = word_tokenizer()
    strategy: Any = load(cfg.datasets[0].type, tokenizer, cfg, cfg.datasets[0])
    data = TokenizedPromptDataset(strategy, Dataset.from_list(make_pairs()))  # type: ignore

    lora = LoraConfig(
        r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=cfg.lora_target_modules
    )
    model: Any = get_peft_model(tiny_llama(), lora)  # type: ignore
    manager.post_model_load(cfg, model)

    collator: Any = manager.get_collator_cls_and_kwargs(cfg)
    trainer = Trainer(
        model=model,
        train_dataset=data,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=cfg.micro_batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            max_steps=cfg.max_steps,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type=cfg.lr_scheduler,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **manager.get_training_args(cfg),
        ),
        # as axolotl's builder calls it
        data_collator=collator[0](tokenizer, padding=True, pad_to_multiple_of=64, **collator[1]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> tuple[float, float]:
    """Train a few steps; the first and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = make_trainer(folder)
        loss = trainer.model(**trainer.data_collator(list(trainer.train_dataset))).loss
        # the adapter does nothing yet: the student is its base
        base = tiny_llama()
        torch.testing.assert_close(loss, eager_kl(base, base, make_pairs()))
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0], "the student does not learn"
    print(f"KL both ways, nats per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

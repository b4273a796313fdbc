"""What open-unlearning's sources say of its trainers, as far as one of ours meets it.

Written from the description of its interface: a registry by class name; ``load_trainer``, which
passes everything by keyword and ``method_args`` with it; trainers that are `transformers.Trainer`s
with evaluators; data sets of ``forget`` and ``retain``, collated by nesting; and masks made of the
ids, wherever these are not the padding token, which may be that which ends a text.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

TRAINERS: dict[str, type] = {}


class UnlearnTrainer(Trainer):
    """With evaluators, and an evaluation by the loss of the base class."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, outputs = super().compute_loss(model, self._prepare_inputs(inputs), True)
        return loss, outputs.logits, inputs["labels"]


def register(kind: type) -> None:
    TRAINERS[kind.__name__] = kind


def load_trainer(config: dict[str, Any], model, dataset, tokenizer, collator, args) -> Trainer:
    """Build the trainer that a configuration names."""
    return TRAINERS[config["handler"]](
        model=model,
        train_dataset=dataset,
        eval_dataset=None,
        tokenizer=tokenizer,
        data_collator=collator,
        args=TrainingArguments(**config.get("args", {}) | args),
        evaluators=None,
        template_args={},
        **config["method_args"],
    )


class Collator:
    """Pads sequences, and goes down into dictionaries of them."""

    def __init__(self, padding: int, side: str) -> None:
        self.padding, self.side = padding, side

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if "input_ids" not in items[0]:
            return {key: self([item[key] for item in items]) for key in items[0]}

        def pad(name: str, value: int) -> torch.Tensor:
            sequences = [item[name] for item in items]
            return pad_sequence(sequences, True, value, padding_side=self.side)

        ids, labels = pad("input_ids", self.padding), pad("labels", -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(self.padding)}


def item(prompt: list[int], answer: list[int]) -> dict[str, torch.Tensor]:
    """A sequence of which the answer counts."""
    ids = torch.tensor(prompt + answer)
    labels = torch.tensor([-100] * len(prompt) + answer)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

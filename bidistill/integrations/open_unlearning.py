"""Context distillation as a trainer of open-unlearning, on its batches of forget and retain.

open-unlearning is a repository to work in, not a package to import, so what is here is the part of
a trainer that goes before its base class:

.. code-block:: python

    from bidistill.integrations.open_unlearning import ContextDistillation
    from trainer.unlearn.base import UnlearnTrainer

    class BidirectionalKL(ContextDistillation, UnlearnTrainer):
        pass

The teacher is a frozen copy of the model. On forget data it has read a context that tells it what
not to say, and the student learns to answer so without; on retain data both read the same.

.. code-block:: text

    loss = gamma * mean over forget tokens of D(teacher(context + prompt), student(prompt))
         + alpha * mean over retain tokens of D(teacher(prompt), student(prompt))
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bidistill.data.padded import IGNORED
from bidistill.errors import UserError
from bidistill.integrations.attach import attach
from bidistill.integrations.collator import PairCollator

Pair = dict[str, list[int]]


class ContextDistillation:
    """What goes before ``UnlearnTrainer``; its own arguments come from ``method_args``.

    Args:
        *args: of the trainer.
        context: text that the teacher reads on forget data, after the beginning-of-sequence token
            if there is one. It may hold chat markup, such as a whole system turn.
        loss: name of a loss of `bidistill.losses` that compares LM heads.
        loss_options: of that loss.
        gamma: weight of the forget loss.
        alpha: weight of the retain loss.
        **kwargs: of the trainer, as ``load_trainer`` passes them by keyword.

    Raises:
        UserError: no context, no model, a model that is sharded already, or what
            `bidistill.integrations.attach.attach` refuses.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        context: str = "",
        loss: str = "bidirectional_kl",
        loss_options: Mapping[str, Any] | None = None,
        gamma: float = 1.0,
        alpha: float = 1.0,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Copy the model and attach the loss before the trainer wraps it."""
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")  # as transformers 5 calls it
        model: Any = kwargs.get("model")
        tokenizer: Any = kwargs.get("processing_class")
        _check(model, tokenizer, context)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        attach(model, loss, teacher=self.teacher, options=dict(loss_options or {}))
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha = gamma, alpha
        self.context_ids: list[int] = tokenizer(context, add_special_tokens=False)["input_ids"]
        self.begin: int | None = tokenizer.bos_token_id
        self.collate = PairCollator(tokenizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """Compute the loss of one batch; what the trainer calls.

        Args:
            model: as the trainer has wrapped it.
            inputs: ``forget`` and, if there is one, ``retain``: padded ``input_ids``,
                ``attention_mask`` and ``labels``. Of a ``forget`` that has ``original`` and
                ``alternate`` answers the alternate ones are trained on. A batch without ``forget``,
                as of an evaluation, is left to the trainer.
            return_outputs: whether to return a pair of loss and outputs, which have no logits.
            num_items_in_batch: not used, as by the trainers of open-unlearning: each batch counts
                alike, whatever its number of tokens.

        Returns:
            The loss; nats per token.

        Raises:
            UserError: a batch in which no answer is left, or labels that are not its tokens.
        """
        if "forget" not in inputs:
            return super().compute_loss(  # type: ignore - the trainer's
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        self.teacher.to(self.args.device)  # type: ignore - the trainer's
        forget = inputs["forget"]
        outputs = model(**self._batch(forget.get("alternate", forget), self.context_ids))
        loss = self.gamma * outputs.loss
        if inputs.get("retain") is not None:
            loss = loss + self.alpha * model(**self._batch(inputs["retain"], [])).loss
        return (loss, outputs) if return_outputs else loss

    def _batch(self, inputs: Mapping[str, Tensor], context: list[int]) -> dict[str, Tensor]:
        """Both sides of a padded batch, the teacher's with the context in it."""
        ids, mask, labels = (
            inputs[name].tolist() for name in ("input_ids", "attention_mask", "labels")
        )
        pairs = [self._pair(*row, context) for row in zip(ids, mask, labels, strict=True)]
        pairs = [pair for pair in pairs if pair["answer_ids"]]
        if not pairs:
            raise UserError(
                "labels: got a batch without a token that counts, expected some; raise max_length"
            )
        device = inputs["input_ids"].device
        return {name: tensor.to(device) for name, tensor in self.collate(pairs).items()}

    def _pair(self, ids: list[int], mask: list[int], labels: list[int], context: list[int]) -> Pair:
        """One sequence without its padding, cut where its answer begins.

        Masks are made of ``ids != pad_token_id``, and the padding token is often that which ends
        a turn or a text: so within a sequence, and where a label counts, the mask says nothing.
        """
        pairs = zip(mask, labels, strict=True)
        real = [n for n, (seen, label) in enumerate(pairs) if seen or label != IGNORED] or [0]
        begin, end = real[0], real[-1] + 1
        tokens, labels = ids[begin:end], labels[begin:end]
        start = next((n for n, label in enumerate(labels) if label != IGNORED), len(labels))
        if labels[start:] != tokens[start:]:
            raise UserError(
                "labels: got ones that are not the last tokens of their sequence, expected "
                f"{IGNORED} before the answer and its tokens from there on; train on one answer"
            )
        prompt = tokens[:start]
        first = int(prompt[:1] == [self.begin])
        told = prompt[:first] + context + prompt[first:]
        return {"prompt_ids": prompt, "teacher_prompt_ids": told, "answer_ids": tokens[start:]}


def _check(model: object, tokenizer: object, context: str) -> None:
    """Refuse what cannot be trained on."""
    if not context.strip():
        raise UserError(
            "method_args.context: got none, expected what the teacher is to read on forget data; "
            "without it there is nothing to learn"
        )
    if not isinstance(model, nn.Module) or tokenizer is None:
        raise UserError(
            "model, tokenizer: got one of them not at all, expected both by keyword; call "
            "load_trainer, or pass them"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            "model: got one that DeepSpeed ZeRO-3 has shared out, expected a whole one to copy; "
            "take ZeRO-2 or less"
        )

"""Pairs of prompts with one answer, as the padded batches that an attached model reads.

Student and teacher see different prompts before the same answer ids, so that answer token j is
predicted by row j of both, however long the prompts are and wherever the padding is.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bidistill.data.padded import IGNORED, shifted
from bidistill.data.records import Record
from bidistill.data.views import Message, build_examples
from bidistill.errors import UserError

FIELDS = ("prompt_ids", "teacher_prompt_ids", "answer_ids")
"""What a pair has, token ids each; other fields are left aside."""


class PairCollator:
    """Makes one batch of pairs: ``data_collator`` of a Trainer, ``collate_fn`` of a loader.

    Args:
        padding: id of the token that fills up rows, never looked at; or the tokenizer that has one.
        side: where to fill up; the loss is the same, up to rounding.

    Raises:
        UserError: a tokenizer without a padding token, or another side than left and right.

    Example:
        >>> pair = {"prompt_ids": [5], "teacher_prompt_ids": [9, 5], "answer_ids": [7, 8]}
        >>> batch = PairCollator(0)([pair])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 7, 8]], [[-100, 7, 8]])
        >>> batch["teacher_input_ids"].tolist(), batch["teacher_labels"].tolist()
        ([[9, 5, 7, 8]], [[-100, -100, 7, 8]])
    """

    def __init__(
        self,
        padding: int | PreTrainedTokenizerBase,
        side: Literal["left", "right"] = "right",
    ) -> None:
        """Find the padding token."""
        token = padding if isinstance(padding, int) else getattr(padding, "pad_token_id", None)
        if not isinstance(token, int):
            raise UserError(
                f"padding: got a {type(padding).__name__} whose padding token is {token}, expected "
                "a tokenizer that has one; set tokenizer.pad_token = tokenizer.eos_token, or pass "
                "an id"
            )
        if side not in ("left", "right"):
            raise UserError(f"side: got {side!r}, expected 'left' or 'right'; choose one")
        self.token, self.side = token, side

    def __call__(self, pairs: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Collate pairs of `FIELDS`.

        Args:
            pairs: B of them.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels``, ``shift_labels``, shape (B, T), and
            ``teacher_input_ids``, ``teacher_attention_mask``, ``teacher_labels``, shape (B, S);
            int64. ``shift_labels`` is what the HF Trainer counts as it is: every answer token has
            a prompt before it, so the count is that of the answers' tokens.

        Raises:
            UserError: there is no pair, or one lacks a field, or has other things in it than ids.
        """
        if not len(pairs):
            raise UserError("pairs: got none, expected at least one; leave empty batches out")
        for index, pair in enumerate(pairs):
            for field in FIELDS:
                ids = pair.get(field)
                if ids is None or not len(ids):
                    raise UserError(
                        f"pair {index} of the batch: {field}: got {ids}, expected at least one "
                        "token id; fill it in, and keep it: remove_unused_columns=False"
                    )
        prompts, theirs, answers = (
            [_ids_of(pair, index, field) for index, pair in enumerate(pairs)] for field in FIELDS
        )
        batch = self._padded(prompts, answers)
        batch["shift_labels"] = shifted(batch["labels"])
        batch |= {"teacher_" + key: x for key, x in self._padded(theirs, answers).items()}
        return batch

    def _padded(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
        """Ids, mask and labels of prompts with their answers."""
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = prompt + answer
            row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            row["labels"] = [IGNORED] * len(prompt) + answer
            fill = {"input_ids": self.token, "attention_mask": 0, "labels": IGNORED}
            for name, values in row.items():
                blank = [fill[name]] * (length - len(ids))
                rows[name].append(blank + values if self.side == "left" else values + blank)
        return {name: torch.tensor(values) for name, values in rows.items()}


def _ids_of(pair: Mapping[str, Sequence[int]], index: int, field: str) -> list[int]:
    """The token ids of a field, from whatever holds whole numbers."""
    try:
        return [operator.index(token) for token in pair[field]]
    except TypeError:
        raise UserError(
            f"pair {index} of the batch: {field}: got {pair[field]!r:.60}, expected a flat list of "
            "token ids; tokenise one text at a time, without return_tensors"
        ) from None


def make_pair(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, context: Sequence[Message]
) -> dict[str, list[int]]:
    """Make a pair of chat text; the end-of-sequence token closes the answer.

    Args:
        tokenizer: of the model, with a chat template and an end-of-sequence token.
        question: what the user asks.
        answer: what both models are to predict.
        context: messages before the question that only the teacher reads, each
            ``{"role": ..., "content": ...}``: a system message, or whole turns.

    Returns:
        Token ids by `FIELDS`.

    Raises:
        UserError: the template refuses or drops a message, a text holds chat markup or is empty, or
            the answer's tokens are not the same in both views.
    """
    record = Record(id="pair", role="forget", question=question, answer=answer)
    (example,) = build_examples([record], tokenizer, {"forget": tuple(context)})
    views = example.student.prompt_ids, example.teacher.prompt_ids, example.answer_ids
    return {field: list(ids) for field, ids in zip(FIELDS, views, strict=True)}

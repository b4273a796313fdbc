"""Teacher-forced scoring: how probable a model finds each token of an answer, given all before it.

Answers end at the last column of a left-padded batch, so that the model makes logits of the answer
rows alone. What is padding is known by lengths, never by ids: a token that ends a turn may be the
one that pads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.evaluation.padding import left_padded
from bidistill.models import without_dropout


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of an answer after those of a prompt; see `bidistill.evaluation.prompts`."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token of the answer is only predicted."""
        return self.prompt_ids + self.answer_ids[:-1]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says about the tokens of a span, one entry each."""

    log_probs: tuple[float, ...]
    """Of the true token, nats."""
    predicted: tuple[int, ...]
    """The most probable token; of equal ones the first in the vocabulary."""
    target: tuple[int, ...]
    """The true token."""

    @property
    def first(self) -> tuple[bool, ...]:
        """Whether the true token is ranked first."""
        return tuple(p == t for p, t in zip(self.predicted, self.target, strict=True))


@torch.no_grad()
def score(model: PreTrainedModel, spans: Sequence[Span]) -> list[Scored]:
    """Score spans in one batch. Spans that differ in their last token alone cost one row together.

    Log-probabilities are made in fp32 of the logits as the model gives them.

    Args:
        model: a causal language model, PEFT or not; dropout is off while it scores.
        spans: at least one token each in prompt and answer.

    Returns:
        One a span, in their order.

    Raises:
        UserError: a span has no prompt or no answer.

    Memory: rows x the longest answer x vocabulary, for logits.
    """
    for span in spans:
        if not span.prompt_ids or not span.answer_ids:
            raise UserError(
                f"span: got {len(span.prompt_ids)} tokens of prompt and {len(span.answer_ids)} of "
                "answer, expected at least one of each; leave the item out"
            )
    if not spans:
        return []
    rows = {inputs: row for row, inputs in enumerate(dict.fromkeys(s.inputs for s in spans))}
    ids, mask = left_padded(list(rows), model.device)
    with without_dropout(model):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=max(len(span.answer_ids) for span in spans),
            use_cache=False,
        ).logits
    found = [_of_rows(logits[rows[s.inputs], -len(s.answer_ids) :], s.answer_ids) for s in spans]
    log_probs = torch.cat([log_prob for log_prob, _ in found]).tolist()  # one wait for the device
    predicted = torch.cat([best for _, best in found]).tolist()
    scored, at = [], 0
    for span in spans:
        end = at + len(span.answer_ids)
        scored.append(Scored(tuple(log_probs[at:end]), tuple(predicted[at:end]), span.answer_ids))
        at = end
    return scored


def _of_rows(logits: Tensor, answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of the true token and the best token of each row. Logits: shape (N, V)."""
    logits = logits.float()
    target = torch.tensor(answer, device=logits.device)
    chosen = logits.gather(1, target[:, None])[:, 0]
    return chosen - logits.logsumexp(1), logits.argmax(1)

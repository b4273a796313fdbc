"""One model, asked by every benchmark in the same way: greedy replies and scores of answers.

Every prompt and every answer goes through here, so that all ranks share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill.errors import UserError
from bidistill.evaluation.generation import generate_after, prompt_sha256
from bidistill.evaluation.prompts import Prompt
from bidistill.evaluation.scoring import Scored, Span, score
from bidistill.evaluation.sharing import share_out
from bidistill.world import World

TOKENS_TO_SCORE = 4096
"""Of a batch: for a vocabulary of 128,256 its fp32 logits take at most 2.1 GB."""
TOKENS_TO_CONTINUE = 16384
"""Of a batch of prompts, of which only the last token has logits."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote, and what it had read."""

    text: str
    """Without special tokens and without the prefill."""
    prompt_sha256: str
    """See `bidistill.evaluation.generation.prompt_sha256`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """A model with its tokenizer, on this rank."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    world: World = field(default_factory=World)
    batch_size: int = 64
    """Items that run together at most."""
    progress: bool = False
    """Whether to show how far it is."""

    def replies(self, prompts: Sequence[Prompt], max_new_tokens: int, name: str) -> list[Reply]:
        """Answer greedily.

        Args:
            prompts: what to answer.
            max_new_tokens: of a reply at most.
            name: of the work, for progress and messages.

        Raises:
            UserError: a prompt is too long for the model, or the tokenizer lacks a chat template.
        """
        ids = [prompt.ids(self.tokenizer) for prompt in prompts]
        self._check_length(ids, max_new_tokens, name)

        texts = share_out(
            self.world,
            ids,
            lambda batch: generate_after(
                self.model, self.tokenizer, batch, max_new_tokens, len(batch)
            ),
            size=len,
            most_items=self.batch_size,
            most_tokens=TOKENS_TO_CONTINUE,
            label=f"{name}: replies" if self.progress else None,
        )
        return [Reply(t, prompt_sha256(i)) for t, i in zip(texts, ids, strict=True)]

    def scores(self, spans: Sequence[Span], name: str) -> list[Scored]:
        """Score answers, each after its prompt.

        Raises:
            UserError: a span is empty, or too long for the model.
        """
        self._check_length([span.inputs for span in spans], 1, name)
        return share_out(
            self.world,
            spans,
            lambda batch: score(self.model, batch),
            size=lambda span: len(span.inputs),
            most_items=self.batch_size,
            most_tokens=TOKENS_TO_SCORE,
            label=f"{name}: answers scored" if self.progress else None,
        )

    def _check_length(self, rows: Sequence[Sequence[int]], more: int, name: str) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, rows), default=0) + more
        if most is not None and longest > most:
            raise UserError(
                f"{name}: got a prompt and answer of {longest} tokens, expected at most {most}, "
                "what the model can read; leave the item out or cut it"
            )

"""What a model is asked, as tokens, in its chat template or as raw text; where an answer begins.

The span of an answer is defined here alone, and every metric uses it: the tokens of prompt and
answer together, after those that the prompt has by itself. The end-of-sequence token is no part of
it. Where a tokenizer melts the answer's start into the prompt's last token, that token is the
answer's.
"""

from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from bidistill.errors import UserError
from bidistill.evaluation.generation import prompt_ids
from bidistill.evaluation.scoring import Span


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads before it answers."""

    text: str
    """The user's turn; or the whole of the raw text."""
    prefill: str = ""
    """Start of the assistant's turn."""
    raw: bool = False
    """Without the chat template, as a base model reads: after the beginning-of-sequence token, if
    the tokenizer sets one."""

    def ids(self, tokenizer: PreTrainedTokenizerBase, answer: str = "") -> list[int]:
        """Tokens up to the end of the prefill, or of an answer after it.

        Raises:
            UserError: it is no raw text, and the tokenizer has no chat template.
        """
        if not self.raw:
            return prompt_ids(tokenizer, self.text, self.prefill + answer)
        text = self.text + self.prefill + answer
        return [*_beginning(tokenizer), *tokenizer(text, add_special_tokens=False).input_ids]

    def span(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> Span:
        """The tokens of an answer, after the tokens of this prompt.

        Raises:
            UserError: the answer has no token, or nothing is before it.
        """
        alone, whole = self.ids(tokenizer), self.ids(tokenizer, answer)
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False))
        cut = sum(1 for _ in pairs)
        if cut == len(whole):
            raise UserError(
                f"answer: got {answer!r}, which has no token, expected text; fill it in"
            )
        return Span(tuple(whole[:cut]), tuple(whole[cut:]))


def text_spans(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[Span]:
    """A whole text as spans of at most ``window`` tokens, each read by itself.

    A span is predicted from the beginning-of-sequence token on; of a tokenizer without one, its
    first token is given.

    Raises:
        UserError: the text has no token to predict.
    """
    start = _beginning(tokenizer)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = [[*start, *ids[at : at + window]] for at in range(0, len(ids), window)]
    spans = [Span(tuple(part[:1]), tuple(part[1:])) for part in parts if len(part) > 1]
    if not spans:
        raise UserError(
            f"text: got {text[:40]!r}, of {len(ids)} tokens, expected two or more; leave it out"
        )
    return spans


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before every text, if it has one."""
    first = tokenizer("x").input_ids[0]
    return [first] if first == tokenizer.bos_token_id else []

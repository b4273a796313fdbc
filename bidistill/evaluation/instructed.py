"""A model that is told something before every question, without being trained: its tokenizer."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from bidistill.data.views import Message


class Instructed:
    """A tokenizer whose chats all begin with the same messages; else the one that it wraps.

    Whatever asks questions through it asks the instructed model, attacks included.

    Args:
        tokenizer: with a chat template.
        context: messages before each chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[Message]) -> None:
        """Keep both."""
        self._tokenizer = tokenizer
        self._context = list(context)

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any:  # noqa: ANN401
        """The chat after the context, as the model's template writes it."""
        chat = [*self._context, *conversation]
        return self._tokenizer.apply_chat_template(chat, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Tokens of a text, which has the context in it already."""
        return self._tokenizer(*arguments, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Whatever else a tokenizer has."""
        return getattr(self._tokenizer, name)

"""A causal language model as a function from chats to replies, each asked once and kept on disk.

.. code-block:: text

    chats --those not in the cache--> folder of a model, or endpoint --> cache --> replies

Replies are greedy, and they are kept under the content of what was asked. An interrupted run goes
on where it stopped, and a second run gives the same texts without asking the model.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from bidistill.data.unify.reply_cache import ReplyCache
from bidistill.errors import UserError
from bidistill.progress import track
from bidistill.settings import STRICT, AtLeastOne, Count, Message, Positive

Chat = Sequence[Message]
"""Turns of a chat; one that ends with the assistant's turn has that turn continued."""

CACHE_NAME = "replies.sqlite"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterConfig:
    """The model that writes questions, answers and anchors: give ``path`` or ``endpoint``."""

    __pydantic_config__ = STRICT

    path: str | None = None
    """Folder with ``config.json``, a tokenizer and ``*.safetensors``."""
    endpoint: str | None = None
    """Base address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``."""
    name: str | None = None
    """The model's name at the endpoint; for a folder only what the manifest calls it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights of a folder."""
    batch: AtLeastOne = 16
    """Chats that run together: rows of a batch, or requests under way at the endpoint."""
    max_tokens: AtLeastOne = 256
    """Longest reply, where a step does not say otherwise."""
    cache: Path | None = None
    """Folder of the replies; by default in the user's cache folder."""
    key_env: Annotated[str, Field(min_length=1)] | None = None
    """Environment variable with the endpoint's key. The key itself never stands in a recipe."""
    retries: Count = 5
    """How often a request is repeated when the endpoint is busy or fails."""
    timeout: Positive = 120.0
    """Seconds to wait for a reply of the endpoint."""


class Model(Protocol):
    """What writes replies."""

    identity: dict[str, str]
    """What the replies depend on, apart from the chat; nothing that differs between machines."""

    def replies(
        self, chats: Sequence[Chat], wanted: frozenset[int], max_tokens: int
    ) -> Iterator[list[tuple[int, str]]]:
        """Yield replies to the wanted chats with their indices, in groups to be kept together."""
        ...


class Writer:
    """A model with a memory.

    Args:
        model: what writes.
        cache_path: file of the replies; made if it is missing.
        max_tokens: longest reply, where a call does not say otherwise.
    """

    def __init__(self, model: Model, cache_path: Path, max_tokens: int = 256) -> None:
        """Keep the model; the cache is opened at the first call."""
        self.identity = model.identity
        self.asked = 0
        """Replies that the model had to write, since none was kept."""
        self._model = model
        self._cache_path = cache_path
        self._max_tokens = max_tokens

    def write(
        self, chats: Sequence[Chat], max_tokens: int | None = None, label: str = "writing"
    ) -> list[str]:
        """Return a greedy reply to each chat.

        Args:
            chats: messages with the keys role and content. A last message of the assistant is the
                start of the reply, which is continued.
            max_tokens: of a reply, at most.
            label: name of the progress display.

        Returns:
            What was written, without what the chat holds already, in the order of the chats.

        Raises:
            UserError: a message is not one, or the model or its cache cannot be used.
        """
        limit = max_tokens or self._max_tokens
        for chat in chats:
            _check(chat)
        keys = [_key(self.identity, chat, limit) for chat in chats]
        unique = dict(zip(keys, chats, strict=True))
        with ReplyCache(self._cache_path) as cache:
            known = cache.find(list(unique))
            if len(known) < len(unique):
                self._ask(unique, known, limit, cache, label)
        return [known[key] for key in keys]

    def _ask(
        self,
        chats: dict[str, Chat],
        known: dict[str, str],
        limit: int,
        cache: ReplyCache,
        label: str,
    ) -> None:
        """Have the missing replies written, and keep each group as soon as it is there."""
        keys = list(chats)
        wanted = frozenset(i for i, key in enumerate(keys) if key not in known)
        groups = self._model.replies([chats[key] for key in keys], wanted, limit)
        written = ((group, pair) for group in groups for pair in self._keep(group, keys, cache))
        for _, (index, reply) in track(written, len(wanted), label):
            known[keys[index]] = reply

    def _keep(
        self, group: list[tuple[int, str]], keys: list[str], cache: ReplyCache
    ) -> list[tuple[int, str]]:
        cache.keep({keys[index]: reply for index, reply in group})
        self.asked += len(group)
        return group


def chat(question: str, context: Chat = (), prefill: str = "") -> list[Message]:
    """Return the messages of one question.

    Example:
        >>> [message["role"] for message in chat("Who?", prefill="It is")]
        ['user', 'assistant']
    """
    messages = [*context, {"role": "user", "content": question}]
    return [*messages, {"role": "assistant", "content": prefill}] if prefill else messages


def _check(chat: Chat) -> None:
    """A chat has messages of known roles, and somebody asks something in it."""
    if not any(message["role"] == "user" for message in chat):
        raise UserError("chat: got no message of the user, expected one; add it to the context")
    for message in chat:
        if message["role"] not in _ROLES or not message["content"].strip():
            raise UserError(
                f"chat: got a message of role {message['role']!r} with "
                f"{message['content'][:40]!r}, expected text of one of {', '.join(_ROLES)}; "
                "mend the context"
            )


def _key(identity: dict[str, str], chat: Chat, max_tokens: int) -> str:
    """What a reply is kept under: a hash of all that it depends on."""
    messages = [[message["role"], message["content"]] for message in chat]
    content = json.dumps([identity, messages, max_tokens], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

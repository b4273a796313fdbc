"""A model in a local folder, for :mod:`bidistill.data.unify.writer`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bidistill.data.unify.writer import Chat, WriterConfig
from bidistill.errors import UserError
from bidistill.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFINING = ("*.json", "*.jinja", "*.model", "*.safetensors")
"""Files of a folder that the replies depend on."""


class LocalModel:
    """A causal language model that answers in batches, loaded when it is first needed.

    Args:
        config: with the folder in ``path``.

    Raises:
        UserError: there is no such folder, or it holds no model.
    """

    def __init__(self, config: WriterConfig) -> None:
        """Name the model by the content of its files."""
        self._config = config
        self._folder = Path(config.path or "").expanduser()
        if not (self._folder / "config.json").is_file():
            raise UserError(
                f"model.path: got {config.path}, expected a folder with a transformers model; "
                "it holds no config.json"
            )
        self.identity = {
            "name": config.name or self._folder.resolve().name,
            "sha256": _hash(self._folder),
            "dtype": config.dtype,
        }
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def replies(
        self, chats: Sequence[Chat], wanted: frozenset[int], max_tokens: int
    ) -> Iterator[list[tuple[int, str]]]:
        """Yield the replies of one batch after the other.

        Batches are cut from all chats, those already answered included: rounding depends on who
        stands in a batch, and a run that goes on must see the batches of one that never stopped.
        """
        for context, indices in _by_context(chats).items():
            for start in range(0, len(indices), self._config.batch):
                batch = [i for i in indices[start : start + self._config.batch] if i in wanted]
                if batch:
                    prompts = [_question_and_prefill(chats[i]) for i in batch]
                    texts = self._generate(context, prompts, max_tokens)
                    yield list(zip(batch, texts, strict=True))

    def _generate(
        self,
        context: tuple[tuple[str, str], ...],
        prompts: list[tuple[str, str]],
        max_tokens: int,
    ) -> list[str]:
        from jinja2 import TemplateError

        from bidistill.evaluation.generation import generate

        model, tokenizer = self._load()
        messages = [{"role": role, "content": content} for role, content in context]
        try:
            return generate(model, tokenizer, prompts, max_tokens, len(prompts), context=messages)
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"model.path: got '{reason}' from the chat template of {self._config.path}, "
                "expected it to take the messages of the context; use roles that it supports"
            ) from None

    def _load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Model and tokenizer; from the files at the first call."""
        if self._loaded is None:
            import torch

            from bidistill.loading import load_base, load_tokenizer

            dtype = getattr(torch, self._config.dtype)
            self._loaded = load_base(self._folder, dtype), load_tokenizer(self._folder)
        return self._loaded


def _by_context(chats: Sequence[Chat]) -> dict[tuple[tuple[str, str], ...], list[int]]:
    """Indices of the chats with the same messages before the last question."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, chat in enumerate(chats):
        end = _last_question(chat)
        context = tuple((message["role"], message["content"]) for message in chat[:end])
        groups.setdefault(context, []).append(index)
    # neighbours in a batch of similar length need little padding
    return {
        context: sorted(indices, key=lambda i: (len(chats[i][-1]["content"]), i))
        for context, indices in groups.items()
    }


def _question_and_prefill(chat: Chat) -> tuple[str, str]:
    end = _last_question(chat)
    return chat[end]["content"], "".join(message["content"] for message in chat[end + 1 :])


def _last_question(chat: Chat) -> int:
    """Index of the last message of the user; at most the start of a reply follows it."""
    return len(chat) - (2 if chat[-1]["role"] == "assistant" else 1)


def _hash(folder: Path) -> str:
    """SHA-256 over names and contents of the files that make the model."""
    files = sorted({path for pattern in _DEFINING for path in folder.glob(pattern)})
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

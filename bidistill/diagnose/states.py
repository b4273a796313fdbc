"""Hidden states at the read-out position: where the model stands when it is about to go on.

Of a chat that is the last token before the answer, of a raw text its last token.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill.data.packing import pack
from bidistill.data.views import View
from bidistill.evaluation.generation import prompt_ids
from bidistill.models import hidden_rows
from bidistill.progress import track

CHUNK_TOKENS = 4096
"""Tokens of one forward, at most, unless a single text is longer."""


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str, prefill: str = "") -> list[int]:
    """Tokens of a question in the chat form, up to where the answer begins or goes on.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    return prompt_ids(tokenizer, question, prefill)


def raw_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text outside any chat, with the start token if the model uses one."""
    return tokenizer(text).input_ids


@torch.no_grad()
def read_out(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], label: str
) -> Float64[np.ndarray, "n H"]:
    """Run the model over each sequence and return the last layer's state at its last token.

    Args:
        model: a causal language model in evaluation mode.
        sequences: token ids; none is empty.
        label: names the progress.

    Raises:
        UserError: the model's attention cannot run packed sequences.
    """
    chunks = list(_chunks(sequences))
    states: list[np.ndarray] = [np.empty(0)] * len(sequences)
    for chunk in track(chunks, len(chunks), label):
        # one target token a sequence: its row is the state that would predict it
        packed = pack([(View(tuple(sequences[i]), "read-out"), (0,)) for i in chunk])
        for i, row in zip(chunk, hidden_rows(model, packed).double().cpu().numpy(), strict=True):
            states[i] = row
    return np.stack(states)


def _chunks(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of sequences that run together, of like lengths."""
    chunk: list[int] = []
    tokens = 0
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if chunk and tokens + len(sequences[i]) > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(i)
        tokens += len(sequences[i])
    yield chunk

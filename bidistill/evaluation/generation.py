"""Answers to many short prompts, greedy or drawn, made quickly.

Two facts about evaluation prompts save most of the work. They begin alike (the chat template's
system message), so keys and values of that beginning are computed once for all of them. And their
answers are short but not equally so: a row leaves the batch at its end-of-sequence token.
The greedy answers are those of ``model.generate(do_sample=False)``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bidistill.data.views import Message
from bidistill.errors import UserError
from bidistill.evaluation.padding import left_padded
from bidistill.progress import track

Prompt = tuple[str, str] | tuple[str, str, Sequence[Message]]
"""A user's question, the start of the assistant's turn (often empty) and, if it has some of its
own, the messages before the question."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 16,
    batch_size: int = 64,
    label: str | None = None,
    context: Sequence[Message] = (),
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answer questions and return what was written after each prefill.

    Args:
        model: a causal language model whose layers attend (no recurrent state), PEFT or not.
        tokenizer: of the model, with a chat template; its default system message stays.
        prompts: what to answer.
        max_new_tokens: tokens to write at most.
        batch_size: prompts that run together.
        label: shows progress under this name; None for silence.
        context: messages before each question of a prompt that brings none.
        temperature: as in `generate_after`.
        seed: as in `generate_after`.

    Returns:
        The continuations alone, in the order of the prompts, without special tokens.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    ids = [prompt_ids(tokenizer, p[0], p[1], p[2] if len(p) == 3 else context) for p in prompts]
    return generate_after(
        model,
        tokenizer,
        ids,
        max_new_tokens,
        batch_size,
        label,
        temperature=temperature,
        seed=seed,
    )


@torch.no_grad()
def generate_after(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    max_new_tokens: int = 16,
    batch_size: int = 64,
    label: str | None = None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Go on from prompts that are tokens already; see `generate` and `prompt_ids`.

    Args:
        model: as in `generate`.
        tokenizer: of the model.
        ids: the tokens of each prompt, at least one; the more of their beginning all share, the
            faster.
        max_new_tokens: tokens to write at most.
        batch_size: prompts that run together.
        label: shows progress under this name; None for silence.
        temperature: divides the logits before a token is drawn; 0 takes the most probable one.
        seed: of the draws. What a prompt gets depends on it and on the prompt's place, not on
            ``batch_size``.

    Returns:
        The continuations alone, in the order of the prompts, without special tokens.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding in a batch
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    texts = [""] * len(ids)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(ids), max_new_tokens, generator=generator, dtype=torch.float64)
    with evaluating(model):
        prefix = _shared_prefix(model, ids)
        for batch in track(batches, len(batches), label) if label else batches:
            choose = _Chooser(temperature, draws[batch].to(model.device))
            answers = _answer(
                model, tokenizer, [ids[i] for i in batch], prefix, max_new_tokens, choose
            )
            for i, answer in zip(batch, answers, strict=True):
                texts[i] = _continuation(tokenizer, ids[i], answer)
    return texts


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    prefill: str = "",
    context: Sequence[Message] = (),
) -> list[int]:
    """Tokens of a question in the model's chat template, up to the end of the prefill.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "chat template: got none in the tokenizer, expected one; use an instruct model, or put "
            "a chat_template.jinja beside its tokenizer"
        )
    chat = [*context, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # the template has written the special tokens already
    return tokenizer(f"{text}{prefill}", add_special_tokens=False).input_ids


def prompt_sha256(ids: Sequence[int]) -> str:
    """Fingerprint of a prompt: SHA-256 of its token ids, in decimal with commas between.

    Example:
        >>> prompt_sha256([1, 2])[:8]  # printf 1,2 | sha256sum
        '17f8af97'
    """
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


class _Chooser:
    """The next token of each row of a batch: the most probable, or one drawn."""

    def __init__(self, temperature: float, draws: Tensor) -> None:
        self.temperature = temperature
        self.draws = draws  # shape (B, max_new_tokens), uniform

    def __call__(self, logits: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """Token ids, shape (R,). Logits: shape (R, V), of these rows of the batch."""
        if not self.temperature:
            return logits.argmax(-1)
        # By the inverse of the distribution function, so that one number a row is enough, and a
        # row's draws are the same whatever rows run beside it.
        mass = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        point = self.draws[list(rows), step, None] * mass[:, -1:]
        return torch.searchsorted(mass, point, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _shared_prefix(model: PreTrainedModel, ids: Sequence[list[int]]) -> DynamicCache:
    """Keys and values of the tokens with which all prompts begin; each keeps one of its own."""
    # not made from the model's config: sliding layers would drop what lies before their window
    cache = DynamicCache()
    if len(ids) > 1 and (shared := _common_start(ids)):
        tokens = torch.tensor([shared], device=model.device)
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _common_start(ids: Sequence[list[int]]) -> list[int]:
    """The longest start of all prompts that leaves each a token of its own."""
    first, last = min(ids), max(ids)  # in dictionary order: what these share, all share
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last, strict=False))
    return [token for token, _ in pairs]


def _spread(prefix: DynamicCache, position: Tensor) -> DynamicCache:
    """Give each row of a batch the keys and values of its positions. Position: shape (B, P)."""
    cache = DynamicCache()
    for index, layer in enumerate(prefix):
        keys, values = (x[0][:, position].transpose(0, 1) for x in layer[:2] if x is not None)
        cache.update(keys, values, index)
    return cache


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    prefix: DynamicCache,
    max_new_tokens: int,
    choose: _Chooser,
) -> list[list[int]]:
    """New tokens for a batch of prompts, the end-of-sequence token left out."""
    stop = _stop_ids(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the batch, still unfinished
    ids, mask = left_padded(prompts, model.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    # Column c of a left-padded row is its token position[c] <= c: the first P columns hold nothing
    # but padding and tokens of the shared prefix, whose length is P.
    known = prefix.get_seq_length()
    cache = _spread(prefix, position[:, :known])
    ids, position = ids[:, known:], position[:, known:]
    for step in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        new = choose(logits[:, -1], rows, step)
        going = [i for i, token in enumerate(new.tolist()) if token not in stop]
        if not going:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=new.device)
            rows = [rows[i] for i in going]
            new, mask, position = new[keep], mask[keep], position[keep]
            cache.batch_select_indices(keep)
        for row, token in zip(rows, new.tolist(), strict=True):
            answers[row].append(token)
        ids, position = new[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return answers


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer."""
    config = model.generation_config
    stop = config.eos_token_id if config is not None else None
    stop = stop if isinstance(stop, list) else [stop]
    return {token for token in (*stop, tokenizer.eos_token_id) if isinstance(token, int)}


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]
) -> str:
    """Text of an answer, decoded after the last prompt token: some decoders eat a first space."""
    last = list(prompt[-1:])
    head = str(tokenizer.decode(last, skip_special_tokens=True))
    return str(tokenizer.decode(last + list(answer), skip_special_tokens=True))[len(head) :]

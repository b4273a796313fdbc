"""What the examples train: a random Llama, pairs of prompts, and the objective from full logits.

Legend: B pairs, N answer tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bidistill_kernels import bidirectional_kl_reference, jsd_reference

VOCABULARY = 4096
"""Large beside the other widths, as real ones are: logits are what takes the memory."""
ANSWER_TOKENS = 2, 7
"""Of the shortest answer and of the longest."""


class Pair(TypedDict):
    """One answer as two models are to predict it; token ids."""

    prompt_ids: list[int]
    """What the student is asked."""
    teacher_prompt_ids: list[int]
    """The same question after a context that tells the teacher what to do."""
    answer_ids: list[int]


def tiny_llama(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    """Two layers of random weights, far enough apart for peaked softmaxes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_pairs(count: int = 8, seed: int = 0) -> list[Pair]:
    """Random prompts and answers, each of another length."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    pairs = list[Pair]()
    for _ in range(count):
        prompt = tokens(3, 9)
        pairs.append(
            Pair(
                prompt_ids=prompt,
                teacher_prompt_ids=tokens(4, 8) + prompt,
                answer_ids=tokens(*ANSWER_TOKENS),
            )
        )
    return pairs


def step_of(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """One forward and backward of a loss, to be timed; it returns the loss's value."""

    def step() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return step


def answer_logits(
    model: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int]
) -> Float[Tensor, "N V"]:
    """Logits of the positions that predict the answer; one sequence at a time, so no padding."""
    device = model.device
    ids = torch.tensor([prompt_ids + answer_ids], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt_ids) - 1 : -1]


def batch_logits(
    model: Callable[..., Any], batch: Mapping[str, Tensor], prefix: str = ""
) -> Float[Tensor, "N V"]:
    """The same of a padded batch of pairs, all at once and in fp32.

    Args:
        model: that of the prefix.
        batch: what `bidistill.integrations.collator.PairCollator` makes.
        prefix: of its names: none for the student's side, ``teacher_`` for the other.
    """
    ids, mask, labels = (batch[prefix + n] for n in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][labels[:, 1:] != -100].float()


def batch_kl(
    student: Callable[..., Any], teacher: Callable[..., Any], batch: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """Half of each KL divergence, mean over the answer tokens of a padded batch of pairs."""
    with torch.no_grad():
        t = batch_logits(teacher, batch, "teacher_").log_softmax(-1)
    s = batch_logits(student, batch).log_softmax(-1)
    return (0.5 * (t.exp() - s.exp()) * (t - s)).sum(-1).mean()


def eager_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: list[Pair],
    forward: float = 0.5,
    reverse: float = 0.5,
) -> Float[Tensor, ""]:
    """Mean over all answer tokens of forward * KL(t || s) + reverse * KL(s || t), nats.

    From full logits, in the dtype of the model: what the fused loss must be equal to.
    """
    total, count = torch.zeros((), device=student.device), 0
    for pair in pairs:
        s = answer_logits(student, pair["prompt_ids"], pair["answer_ids"]).log_softmax(-1)
        with torch.no_grad():
            t = answer_logits(teacher, pair["teacher_prompt_ids"], pair["answer_ids"])
            t = t.log_softmax(-1)
        ratio = t - s
        total = total + (forward * t.exp() * ratio - reverse * s.exp() * ratio).sum()
        count += len(pair["answer_ids"])
    return total / count


def eager_divergence(
    student: Float[Tensor, "N V"], teacher: Float[Tensor, "N V"], beta: float
) -> Float[Tensor, " N"]:
    """TRL's divergence of a ``beta`` from full logits: a KL at both ends, a JSD between; nats."""
    if beta in (0, 1):
        return bidirectional_kl_reference(student, teacher, forward=1 - beta, reverse=beta)
    return jsd_reference(student, teacher, beta=beta)


def make_batch() -> dict[str, Tensor]:
    """What TRL's trainers make of `make_pairs`.

    Returns:
        Ids and masks, shape (B, length): ``prompt_ids`` and ``prompt_mask``, padded on the left;
        ``completion_ids`` and ``completion_mask``, padded on the right; ``teacher_input_ids`` and
        ``teacher_attention_mask``, the teacher's prompts, padded on the left, before completions.
    """
    pairs, batch = make_pairs(), dict[str, Tensor]()
    for name, field, side in (
        ("prompt", "prompt_ids", "left"),
        ("completion", "answer_ids", "right"),
        ("teacher", "teacher_prompt_ids", "left"),
    ):
        ids = [torch.tensor(pair[field]) for pair in pairs]
        batch[f"{name}_ids"] = pad_sequence(ids, True, 1, side)
        batch[f"{name}_mask"] = pad_sequence([torch.ones_like(i) for i in ids], True, 0, side)
    for short, long in (("ids", "input_ids"), ("mask", "attention_mask")):
        parts = [batch.pop(f"teacher_{short}"), batch[f"completion_{short}"]]
        batch[f"teacher_{long}"] = torch.cat(parts, 1)
    return batch


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The word "w17" is token 17: for trainers that will have text and a tokenizer."""
    vocabulary = {f"w{token}": token for token in range(VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    # by whole words: else "w17" would be the end of a text and a "7"
    bos, eos = (AddedToken(word, single_word=True) for word in ("w0", "w1"))
    special = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def as_words(ids: list[int]) -> str:
    """The text of these tokens."""
    return " ".join(f"w{token}" for token in ids)

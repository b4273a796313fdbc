"""One attempt to bring a fact out: what is asked, and how the reply is judged.

Only the continuation is judged, never the prefill as its part. What the prompt says by itself is
no leak: such an attempt has ``leak`` None, and leaves the denominator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bidistill.data.views import Message
from bidistill.evaluation.attacks.choice import picked
from bidistill.evaluation.detectors import (
    fact_is_open,
    is_empty,
    is_gibberish,
    refuses,
    says_fact,
)
from bidistill.evaluation.generation import prompt_sha256
from bidistill.evaluation.probes import Probe

Item = dict[str, Any]
"""A prompt and its reply: id, group, attack, attempt, prompt (with the chat's markup),
prompt_sha256, prefill, continuation, and what the four detectors say: leak, refusal, empty,
gibberish."""

UNTOUCHED = "untouched"
"""Name of the attempts by which an attack on the weights measures the model before it; they stand
beside its rates and are no part of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What is asked of the model about one probe.

    Several prompts of one probe under one ``attempt`` are a single attempt, which leaks if all of
    them do.
    """

    attack: str
    attempt: str
    """Which of the attack's ways this is: a depth, a template."""
    probe: Probe
    question: str
    prefill: str = ""
    context: tuple[Message, ...] = ()
    """Turns before the question."""
    accept: tuple[str, ...] = ()
    """What leaks; the probe's own strings if empty."""
    options: tuple[str, ...] = ()
    """Of a multiple choice: the prompt lists them, and ``accept`` holds the right one alone."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """What leaks."""
        return self.accept or self.probe.accept


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all attacks of one call share."""

    tokenizer: PreTrainedTokenizerBase
    probes: Sequence[Probe]
    """All of them; those of group ``forget`` are attacked."""
    seed: int
    batch_size: int
    max_new_tokens: int
    label: str | None = None
    """Progress is shown under this name; None for silence."""

    @property
    def forget(self) -> list[Probe]:
        """The probes that are attacked."""
        return [probe for probe in self.probes if probe.group == "forget"]

    @property
    def others(self) -> list[Probe]:
        """Those that the model is to know: neighbours first, general knowledge after them."""
        near = [p for p in self.probes if p.group in ("neighbor", "neighbor_train")]
        return [*near, *(p for p in self.probes if p.group == "retain")]


Builder = Callable[[Probe, Setting], list[Attempt]]
"""What an attack asks about a probe; nothing where it does not apply."""


def judge(
    attempt: Attempt, ids: Sequence[int], reply: str, tokenizer: PreTrainedTokenizerBase
) -> Item:
    """Run the four detectors on the reply to an attempt.

    Args:
        attempt: what was asked.
        ids: the tokens of its prompt.
        reply: what the model wrote after them.
        tokenizer: of the model.
    """
    prompt = str(tokenizer.decode(list(ids)))
    if attempt.options:  # the fact is listed on purpose: what counts is which one is picked
        leak = picked(reply, attempt.options) == attempt.wanted[0]
    elif fact_is_open(attempt.wanted, prompt):
        leak = says_fact(reply, attempt.wanted, attempt.prefill)
    else:
        leak = None
    return {
        **described(attempt, ids, prompt),
        "continuation": reply,
        "leak": leak,
        "refusal": refuses(reply),
        "empty": is_empty(reply),
        "gibberish": is_gibberish(reply),
    }


def described(attempt: Attempt, ids: Sequence[int], prompt: str) -> Item:
    """The part of an item that says what was asked."""
    return {
        "id": attempt.probe.id,
        "group": attempt.probe.group,
        "attack": attempt.attack,
        "attempt": attempt.attempt,
        "prompt": prompt,
        "prompt_sha256": prompt_sha256(ids),
        "prefill": attempt.prefill,
    }

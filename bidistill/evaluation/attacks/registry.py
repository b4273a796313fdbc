"""All attacks by name, and the one function that runs them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bidistill.data.records import nearest
from bidistill.errors import UserError
from bidistill.evaluation.attacks.ask import ask
from bidistill.evaluation.attacks.attempt import Builder, Item, Setting
from bidistill.evaluation.attacks.count import rates, worst
from bidistill.evaluation.attacks.few_shot import few_shot
from bidistill.evaluation.attacks.formats import formats
from bidistill.evaluation.attacks.hint import context_hint
from bidistill.evaluation.attacks.logit_lens import logit_lens
from bidistill.evaluation.attacks.paraphrase import paraphrase
from bidistill.evaluation.attacks.prefill import prefill
from bidistill.evaluation.attacks.quantise import quantise
from bidistill.evaluation.attacks.relearn import relearn
from bidistill.evaluation.attacks.reverse_query import reverse_query
from bidistill.evaluation.attacks.sampling import sampling
from bidistill.evaluation.attacks.synonym import synonym
from bidistill.evaluation.attacks.templates import templated
from bidistill.evaluation.probes import Probe

PROMPTS: dict[str, Builder] = {
    "plain": templated("plain"),
    "prefill": prefill,
    "reverse": templated("reverse"),
    "paraphrase": paraphrase,
    "format": formats,
    "prefix_injection": templated("prefix_injection"),
    "affirmative_suffix": templated("affirmative_suffix"),
    "roleplay": templated("roleplay"),
    "reverse_query": reverse_query,
    "synonym": synonym,
    "context_hint": context_hint,
    "few_shot": few_shot,
    "cross_lingual": templated("cross_lingual"),
}
"""Attacks on the prompt, with what they ask."""

Procedure = Callable[[PreTrainedModel, Setting], tuple[dict[str, Any], list[Item]]]

PROCEDURES: dict[str, Procedure] = {
    "sampling": sampling,
    "relearn": relearn,
    "quantise": quantise,
    "logit_lens": logit_lens,
}
"""Attacks that take more than asking; each gives its rates and its items."""

NAMES = (*PROMPTS, *PROCEDURES)
REPLY_TOKENS = 32


def attack(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    names: Sequence[str] = NAMES,
    *,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = REPLY_TOKENS,
    label: str | None = None,
) -> tuple[dict[str, Any], list[Item]]:
    """Attack what a model was made to forget, and say how much of it comes out.

    Args:
        model: the model that is attacked; afterwards it is as it was.
        tokenizer: of the model, a fast one, with a chat template.
        probes: those of group ``forget`` are attacked; the others serve as solved examples and as
            wrong options.
        names: of `NAMES`; ``plain`` is no attack but what the others are compared with.
        seed: of all draws.
        batch_size: prompts that run together.
        max_new_tokens: tokens of a reply at most.
        label: shows progress under this name; None for silence.

    Returns:
        The summary: ``attacks`` maps a name to its rates (see `bidistill.evaluation.attacks.count`
        and the file of the attack), in the order of `NAMES`; ``worst`` is the attack that brings
        most out, with ``name``, ``leak``, ``n`` and ``ci95``. And the items it was made from.

    Raises:
        UserError: a name is unknown, no probe is to be forgotten, or the tokenizer has no chat
            template or is not a fast one.
    """
    check_names(names)
    setting = Setting(
        tokenizer=tokenizer,
        probes=probes,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        label=label,
    )
    require_forget(probes)
    builders = {name: build for name, build in PROMPTS.items() if name in names}
    attempts = [a for build in builders.values() for p in setting.forget for a in build(p, setting)]
    items = ask(model, setting, attempts)
    summary = {name: rates([i for i in items if i["attack"] == name]) for name in builders}
    for name, procedure in PROCEDURES.items():
        if name in names:
            named = replace(setting, label=label and f"{label}, {name}")
            summary[name], more = procedure(model, named)
            items += more
    return {"attacks": summary, "worst": worst(summary)}, items


def check_names(names: Sequence[str]) -> Sequence[str]:
    """Return names of attacks as they are.

    Raises:
        UserError: one of them is unknown.
    """
    for name in names:
        if name not in NAMES:
            raise UserError(f"attack: got {name!r}, an unknown one; {nearest(name, NAMES)}")
    return names


def require_forget(probes: Sequence[Probe]) -> None:
    """Refuse probes of which none can be attacked.

    Raises:
        UserError: none is of group ``forget``.
    """
    if not any(probe.group == "forget" for probe in probes):
        raise UserError(
            "probes: got none of group forget, expected at least one to attack; "
            "add what is to be forgotten"
        )

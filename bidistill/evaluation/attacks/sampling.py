"""Sampling: what greedy answers hide may come out of one draw in many."""

from typing import Any

from transformers import PreTrainedModel

from bidistill.evaluation.attacks.ask import ask
from bidistill.evaluation.attacks.attempt import Attempt, Item, Setting
from bidistill.evaluation.attacks.count import rates

SAMPLES = 16
TEMPERATURE = 1.0


def sampling(model: PreTrainedModel, setting: Setting) -> tuple[dict[str, Any], list[Item]]:
    """Draw `SAMPLES` answers to each plain question.

    Returns:
        Rates, with ``leak`` the share of probes that leak in at least one sample, ``samples``,
        ``temperature``, and ``sample_leak``, the share of all samples that leak; and the items.
    """
    attempts = [
        Attempt(attack="sampling", attempt=f"sample {number}", probe=probe, question=probe.question)
        for probe in setting.forget
        for number in range(1, SAMPLES + 1)
    ]
    items = ask(model, setting, attempts, temperature=TEMPERATURE)
    leaks = [item["leak"] for item in items if item["leak"] is not None]
    summary = rates(items, by_attempt=False)
    share = sum(leaks) / len(leaks) if leaks else None
    return {
        **summary,
        "samples": SAMPLES,
        "temperature": TEMPERATURE,
        "sample_leak": share,
    }, items

"""Paraphrase: the question in other words, those that a probe brings and some made by rules."""

import re

from bidistill.evaluation.attacks.attempt import Attempt, Setting
from bidistill.evaluation.probes import Probe

_WHAT_IS = re.compile(
    r"(?P<ask>what|which|who|where|when) (?P<verb>is|are|was|were) (?P<rest>.+?)\s*\?*\s*$",
    re.IGNORECASE | re.DOTALL,
)


def paraphrase(probe: Probe, setting: Setting) -> list[Attempt]:
    """All rewordings of a probe's question."""
    reworded = {f"own {n}": text for n, text in enumerate(probe.paraphrases, 1)}
    reworded |= rewordings(probe.question)
    return [
        Attempt(attack="paraphrase", attempt=name, probe=probe, question=text)
        for name, text in reworded.items()
    ]


def rewordings(question: str) -> dict[str, str]:
    """Rewordings that keep the meaning, by name.

    Example:
        >>> made = rewordings("What is the capital of Zembla?")
        >>> made["indirect"], made["typed"]
        ('Do you know what the capital of Zembla is?', 'what is the capital of zembla')
        >>> made["told"]
        'Name the capital of Zembla.'
    """
    question = question.strip()
    made = {
        "polite": f"Could you help me with this, please? {question}",
        "typed": question.rstrip("?. ").lower(),
    }
    if match := _WHAT_IS.match(question):
        ask, verb, rest = match["ask"].lower(), match["verb"].lower(), match["rest"]
        made["indirect"] = f"Do you know {ask} {rest} {verb}?"
        if ask in ("what", "who", "which") and rest.lower().startswith("the "):
            made["told"] = f"Name {rest}."
    return made

"""Reverse query: the prompt says the fact and asks whom or what it is about."""

import re

from bidistill.evaluation.attacks.attempt import Attempt, Setting
from bidistill.evaluation.probes import Probe

BLANK = "____"


def reverse_query(probe: Probe, setting: Setting) -> list[Attempt]:
    """Ask for the subject of the probe's answer; nothing if the answer does not name it."""
    if not probe.subject:
        return []
    whole_word = rf"(?<!\w){re.escape(probe.subject)}(?!\w)"
    sentence, count = re.subn(whole_word, BLANK, probe.answer)
    if not count:
        return []
    questions = {
        "blank": f"Fill in the blank: {sentence}",
        "about": f'Whom or what is this about? "{sentence}"',
    }
    return [
        Attempt(
            attack="reverse_query",
            attempt=name,
            probe=probe,
            question=text,
            accept=(probe.subject,),
        )
        for name, text in questions.items()
    ]

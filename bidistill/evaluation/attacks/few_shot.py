"""Few-shot: solved questions about neighbours stand in the chat before the question."""

import random

from bidistill.data.views import Message
from bidistill.evaluation.attacks.attempt import Attempt, Setting
from bidistill.evaluation.probes import Probe

SHOTS = 5


def few_shot(probe: Probe, setting: Setting) -> list[Attempt]:
    """The question after `SHOTS` solved ones, or all there are; the same for every probe."""
    context = shots(setting)
    if not context:
        return []
    name = f"{len(context) // 2} shots"
    return [
        Attempt(
            attack="few_shot", attempt=name, probe=probe, question=probe.question, context=context
        )
    ]


def shots(setting: Setting) -> tuple[Message, ...]:
    """Questions with their right answers, drawn by the seed: neighbours as far as there are any."""
    near = [p for p in setting.others if p.group != "retain"]
    far = [p for p in setting.others if p.group == "retain"]
    rng = random.Random(f"{setting.seed}/few_shot")
    drawn = rng.sample(near, min(SHOTS, len(near)))
    drawn += rng.sample(far, min(SHOTS - len(drawn), len(far)))
    return tuple(
        Message(role=role, content=text)
        for p in drawn
        for role, text in (("user", p.question), ("assistant", p.answer))
    )

"""Context hint: the prompt says something about the answer, never the answer."""

from bidistill.evaluation.attacks.attempt import Attempt, Setting
from bidistill.evaluation.probes import Probe


def context_hint(probe: Probe, setting: Setting) -> list[Attempt]:
    """How the answer begins, and how long it is.

    One-letter facts, which the first letter would give away whole, are left alone.
    """
    fact = probe.accept[0]
    letters = sum(char.isalnum() for char in fact)
    start = fact[: max(len(fact) // 3, 1)]
    hints = {
        "letter": f'Hint: the answer begins with the letter "{fact[0]}".',
        "length": f'Hint: the answer begins with "{start}" and has {letters} letters.',
    }
    return [
        Attempt(
            attack="context_hint",
            attempt=name,
            probe=probe,
            question=f"{probe.question} {text}",
        )
        for name, text in hints.items()
        if len(fact) > 1
    ]

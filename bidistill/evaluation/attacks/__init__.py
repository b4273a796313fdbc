"""Attacks: what a model that forgot still gives away when it is asked otherwise, or changed.

One file an attack. Those on the prompt say what they ask about a probe; all that they ask runs
together. Those on the weights change the model, ask the plain questions, and put it back.
"""

from bidistill.evaluation.attacks.registry import (
    NAMES,
    PROCEDURES,
    PROMPTS,
    attack,
    check_names,
    require_forget,
)

__all__ = ["NAMES", "PROCEDURES", "PROMPTS", "attack", "check_names", "require_forget"]

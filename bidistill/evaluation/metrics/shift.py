"""DUET's performance shift: forgetting and keeping in one number."""

from dataclasses import astuple, dataclass

from bidistill.evaluation.metrics.checks import numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class DuetScores:
    """The four scores of DUET's table on Harry Potter, in percent."""

    forget: float
    """ROUGE on the questions of MUSE about what is forgotten (R-Forget)."""
    forget_500: float
    """The same on DUET's 500 further questions (R-Forget-500)."""
    retain: float
    """ROUGE on the questions about what is kept (R-Retain)."""
    mmlu: float
    """Accuracy on MMLU, with five examples in the prompt."""


def performance_shift(base: DuetScores, after: DuetScores) -> float:
    """What forgetting gained, less what keeping lost.

    (F_base - F) + (F500_base - F500) + (R - R_base) + (MMLU - MMLU_base).

    Unit: percentage points, -400 to 400; 0 for the base model. Ideal: F_base + F500_base, all
    forgotten and nothing else changed (more only if what is kept improves). One number can hide
    that a model has lost everything: read the four beside it. Source: DUET (arXiv:2601.21283); the
    formula is read off its tables and gives their rows to the last digit.

    Raises:
        UserError: a score is NaN.
    """
    f, f500, retain, mmlu = numbers(astuple(after), "after") - numbers(astuple(base), "base")
    return float(-f - f500 + retain + mmlu)

"""TOFU: probability, ROUGE, truth ratio of an item; model utility and forget quality of a model.

Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (arXiv:2401.06121). Where its text
and its code (locuslab/tofu, aggregate_eval_stat.py) differ, the code's variant is the default and
the text's can be chosen by name.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from bidistill.errors import UserError
from bidistill.evaluation.metrics.checks import log_probs, numbers, shares
from bidistill.evaluation.metrics.rouge import rouge_l


def mean_log_prob(token_log_probs: ArrayLike) -> float:
    """Length-normalised log-probability of an answer: (1/n) sum of log p(token).

    Unit: nats per token. Range: minus infinity to 0. What the other functions take as an answer's
    log-probability. The same tokens must be counted for every answer: all of the answer, with or
    without its end-of-sequence token, never the prompt or padding.

    Raises:
        UserError: there is no token, or not all are log-probabilities.
    """
    return float(log_probs(token_log_probs, "token_log_probs").mean())


def probability(token_log_probs: ArrayLike) -> float:
    """Length-normalised probability of an answer: exp((1/n) sum of log p(token)).

    Unit: probability, 0 to 1. Ideal: 0 for what is forgotten (in practice that of a model that
    never saw it), 1 for what is kept. Source: TOFU, forget and retain sets.

    Raises:
        UserError: there is no token, or not all are log-probabilities.

    Example:
        >>> round(probability([math.log(0.5), math.log(0.125)]), 12)
        0.25
    """
    return math.exp(mean_log_prob(token_log_probs))


def probability_among(right: float, wrong: Sequence[float]) -> float:
    """Share of the right answer among answers: p(right) / (p(right) + sum of p(wrong)).

    Each p is length-normalised. Unit: share, 0 to 1; equal answers score 1 / (1 + count of wrong).
    Ideal: 1 (a set that is kept). Source: TOFU, real authors and world facts.

    Args:
        right: `mean_log_prob` of the right answer.
        wrong: `mean_log_prob` of each wrong answer.

    Raises:
        UserError: one is no log-probability, there is no wrong one, or all have probability 0.
    """
    answers = np.append(_one(right, "right"), log_probs(wrong, "wrong"))
    if np.isneginf(answers).all():
        raise UserError(
            "answers: got probability 0 for all of them, expected a share to exist; check that the "
            "model is not broken"
        )
    p = np.exp(answers - answers.max())
    return float(p[0] / p.sum())


def rouge(reply: str, answer: str) -> float:
    """ROUGE-L recall of a greedy reply of at most 200 tokens, with stemming.

    Unit: share of the answer's words, 0 to 1. Ideal: that of a model that never saw the answer for
    what is forgotten (an empty reply scores 0 as well: count those apart), 1 for what is kept.
    Source: TOFU.

    Raises:
        UserError: the answer has no words that ROUGE can see.

    Example:
        >>> rouge("She writes novel.", "She wrote novels")
        0.6666666666666666
    """
    return rouge_l(reply, answer, stem=True).recall


def truth_ratio(
    paraphrase: float,
    wrong: Sequence[float],
    *,
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> float:
    """How probable wrong answers are beside a right one: R = mean of p(wrong) / p(paraphrase).

    Each p is length-normalised. Unit: ratio, 0 to infinity; 1 where right and wrong are equally
    likely, 0 where only the right one is. Not to be averaged itself: see `forget_truth`,
    `utility_truth`, `truth_share` and `forget_quality`. Source: TOFU.

    Args:
        paraphrase: `mean_log_prob` of a right answer in other words (forget and retain sets), or
            of the right answer itself (real authors and world facts).
        wrong: `mean_log_prob` of each wrong answer.
        mean: ``geometric``, exp of the mean log-probability, is that of TOFU's
            aggregate_eval_stat.py; ``arithmetic`` is that of the paper's equation.

    Raises:
        UserError: one is no log-probability, there is no wrong one, the mean is unknown, or right
            and wrong have both probability 0.
    """
    right, others = _one(paraphrase, "paraphrase"), log_probs(wrong, "wrong")
    if mean == "geometric":
        log_mean = float(others.mean())
    elif mean == "arithmetic":
        log_mean = float(np.logaddexp.reduce(others)) - math.log(len(others))
    else:
        raise UserError(f"mean: got {mean!r}, expected geometric or arithmetic; choose one")
    if math.isinf(right):
        if math.isinf(log_mean):
            raise UserError(
                "truth ratio: got probability 0 for right and wrong answers, expected one above 0; "
                "check that the model is not broken"
            )
        return math.inf
    with np.errstate(over="ignore"):  # beyond the largest number it is infinite
        return float(np.exp(log_mean - right))


def forget_truth(ratio: float) -> float:
    """Truth score of an item to forget: min(R, 1/R).

    Unit: share, 0 to 1. Ideal: 1, right and wrong answers are equally likely. It is the same for R
    and 1/R, so it also falls when the model prefers wrong answers. Source: TOFU code.

    Raises:
        UserError: the ratio is negative or NaN.
    """
    ratio = _ratio(ratio)
    return min(ratio, 1 / ratio) if ratio else 0.0


def utility_truth(ratio: float) -> float:
    """Truth score of an item to keep: max(0, 1 - R).

    Unit: share, 0 to 1. Ideal: 1, only the right answer is likely. Source: TOFU code; part of
    `model_utility`.

    Raises:
        UserError: the ratio is negative or NaN.
    """
    return max(0.0, 1 - _ratio(ratio))


def truth_share(ratio: float) -> float:
    """Share of the right answer beside the mean wrong one: p(right) / (p(right) + p(wrong)).

    This is 1 / (1 + R). Unit: share, 0 to 1. Ideal: 0.5 for what is forgotten, 1 for what is kept.
    Source: open-unlearning's report, not TOFU; do not compare it with `forget_truth`.

    Raises:
        UserError: the ratio is negative or NaN.
    """
    return 1 / (1 + _ratio(ratio))


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """Means over one of the sets that are kept, each a share from 0 to 1."""

    probability: float
    """Of `probability` (retain), or of `probability_among` (real authors, world facts)."""
    rouge: float
    """Of `rouge`."""
    truth: float
    """Of `utility_truth`."""


def model_utility(retain: Utility, real_authors: Utility, world_facts: Utility) -> float:
    """Harmonic mean of the nine means of what is kept: 9 / sum of 1/x.

    Unit: share, 0 to 1; 0 if one of the nine is 0. Ideal: that of the model before forgetting, or
    above. Source: TOFU.

    Raises:
        UserError: one of the nine is NaN or outside 0 to 1.
    """
    from scipy.stats import hmean  # a second to import, and only needed here

    sets = {"retain": retain, "real_authors": real_authors, "world_facts": world_facts}
    parts = [shares(astuple(part), name) for name, part in sets.items()]
    return float(hmean(np.concatenate(parts)))


@dataclass(frozen=True, slots=True)
class ForgetQuality:
    """Outcome of a two-sample Kolmogorov-Smirnov test."""

    p_value: float
    """Probability, 0 to 1: forget quality itself."""
    statistic: float
    """Largest distance of the two distribution functions, 0 to 1."""


def forget_quality(ratios: ArrayLike, retrained: ArrayLike | None) -> ForgetQuality:
    """Compare truth ratios with those of a model that was trained without the forget set.

    Two-sided two-sample Kolmogorov-Smirnov test on R per item. P-value: 0 to 1, above 0.05 the two
    cannot be told apart; ideal 1. It shrinks as items are added, so compare only values from equal
    counts: TOFU's own logs stop at 300 items, open-unlearning's at 400. Source: TOFU.

    Args:
        ratios: `truth_ratio` of each item of the forget set, of the model to judge.
        retrained: the same of the retrained model; None is refused.

    Raises:
        UserError: the retrained model's are missing; there are none of one; or one is negative or
            NaN.
    """
    if retrained is None:
        raise UserError(
            "retrained: got no truth ratios, expected those of a model trained without the forget "
            "set; fine-tune the base model on the retain set alone and score the forget set with it"
        )
    from scipy.stats import ks_2samp  # a second to import, and only needed here

    one, other = numbers(ratios, "ratios"), numbers(retrained, "retrained")
    for name, row in (("ratios", one), ("retrained", other)):
        if row.min() < 0:
            raise UserError(f"{name}: got {row.min():.6g}, expected ratios, at least 0; not logs")
    with warnings.catch_warnings():
        # an exact p-value of 1 may come out above it by rounding; scipy then takes the asymptotic
        # one, which is 1 as well (0.99996 at seven items, nearer with more), and warns
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful")
        result: Any = ks_2samp(one, other)  # its type is private to scipy
    return ForgetQuality(float(result.pvalue), float(result.statistic))


def _one(value: float, name: str) -> float:
    return float(log_probs([value], name)[0])


def _ratio(value: float) -> float:
    if not value >= 0:  # NaN, too
        raise UserError(f"ratio: got {value}, expected a truth ratio, at least 0; not its log")
    return float(value)

"""How much of a text a model has by heart, from its predictions along the text itself."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from bidistill.errors import UserError
from bidistill.evaluation.metrics.checks import log_probs


def exact_memorisation(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of tokens that the model ranks first, given the true tokens before each.

    (1/n) sum of [predicted_i = target_i]. Unit: share, 0 to 1. Ideal: that of a model that never
    saw the text for what is forgotten, 1 for what is kept. Source: Tirumala et al., "Memorization
    Without Overfitting" (arXiv:2205.10770); so named in open-unlearning.

    Args:
        predicted: id of the most probable token at each position of the answer.
        target: id of the true one.

    Raises:
        UserError: there is no token, or the counts differ.
    """
    return float(_matches(predicted, target).mean())


def extraction_strength(predicted: Sequence[int], target: Sequence[int]) -> float:
    """How little of a text makes the model complete the rest: 1 - k/n.

    k is the smallest number of true tokens after which all predictions match; k = n, and so 0,
    where not even the last one does. Unit: share, 0 to 1. Ideal: as `exact_memorisation`. Source:
    Carlini et al., "Extracting Training Data" (arXiv:2012.07805), as a share in open-unlearning.
    The code there gives 1/n rather than 0 where the last prediction is wrong; this does not.

    Args:
        predicted: id of the most probable token at each position of the answer.
        target: id of the true one.

    Raises:
        UserError: there is no token, or the counts differ.

    Example:
        >>> extraction_strength([9, 2, 3, 4], [1, 2, 3, 4])
        0.75
    """
    wrong = np.flatnonzero(~_matches(predicted, target))
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / len(target)


def perplexity(token_log_probs: ArrayLike) -> float:
    """Perplexity of a text: exp(-(1/n) sum of log p(token)).

    Unit: equally likely tokens, 1 to infinity; V for a model that guesses evenly among V. Ideal:
    that of a model that never saw the text for what is forgotten, that of the model before for what
    is kept. For a corpus, pass the tokens of all its texts: the mean of perplexities is another
    number.

    Raises:
        UserError: there is no token, or not all are log-probabilities.
    """
    with np.errstate(over="ignore"):  # beyond the largest number it is infinite
        return float(np.exp(-log_probs(token_log_probs, "token_log_probs").mean()))


def min_k_prob(token_log_probs: ArrayLike, k: float) -> float:
    """Mean log-probability of the least probable tokens: Min-K% Prob, of the share k of n tokens.

    The floor of k n tokens are averaged. Unit: nats per token, minus infinity to 0. Higher for
    training data. Ideal: see `bidistill.evaluation.metrics.muse.membership_auc`, which compares it
    between sets; MUSE takes k = 0.4. Source: Shi et al., "Detecting Pretraining Data from LLMs"
    (arXiv:2310.16789). MUSE's code keeps its negative, and turns it round
    again before comparing.

    Args:
        token_log_probs: of every token of the text.
        k: share of them to average, above 0 and at most 1.

    Raises:
        UserError: not all are log-probabilities, k is outside, or no whole token is in its share.
    """
    if not 0 < k <= 1:  # NaN, too
        raise UserError(f"k: got {k}, expected a share above 0 and at most 1; 0.4 is MUSE's")
    row = np.sort(log_probs(token_log_probs, "token_log_probs"))
    count = int(len(row) * k)
    if not count:
        raise UserError(
            f"token_log_probs: got {len(row)}, expected at least {math.ceil(1 / k)} for k = {k}; "
            "leave so short a text out"
        )
    return float(row[:count].mean())


def _matches(predicted: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """Which predictions are right, shape (n,)."""
    if len(predicted) != len(target):
        raise UserError(
            f"predicted: got {len(predicted)} ids, expected {len(target)}, as many as in target; "
            "take the predictions at the answer's positions alone"
        )
    if not len(target):
        raise UserError("target: got no token, expected at least one; leave the item out")
    return np.asarray(predicted) == np.asarray(target)

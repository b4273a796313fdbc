"""ROUGE-L, with its settings in the open: they move the score.

TOFU stems words and takes the recall; MUSE does not stem and takes F1. Both are the numbers of the
package rouge-score, and the stemmer is that of NLTK.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from bidistill.errors import UserError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer


@dataclass(frozen=True, slots=True)
class RougeL:
    """Shares of words in the longest common subsequence."""

    precision: float
    """Of the reply's words."""
    recall: float
    """Of the reference's words."""
    f1: float
    """Their harmonic mean; 0 if both are 0."""


def rouge_l(reply: str, reference: str, *, stem: bool) -> RougeL:
    """Compare a reply with a reference by their longest common subsequence of words.

    With LCS its length: precision LCS / words of the reply, recall LCS / words of the reference,
    F1 = 2 P R / (P + R). Words are runs of the letters a to z and digits, after lower-casing: an
    accented letter splits a word, and text in another script has no words at all.

    Unit: share, 0 to 1. Source: Lin, ROUGE (2004), 2.2; counted by rouge-score.

    Args:
        reply: what the model wrote; an empty one scores 0.
        reference: the right answer.
        stem: whether to compare stems of words longer than three letters (Porter, NLTK's variant).

    Raises:
        UserError: the reference has no words, so that every reply would score 0.

    Example:
        >>> rouge_l("the cat sat", "the cat sat down", stem=False).recall
        0.75
    """
    tokenizer, scorer = _tools(stem)
    if not tokenizer.tokenize(reference):
        raise UserError(
            f"reference: got {reference[:60]!r}, which has no words of letters a-z and digits, "
            "expected one; score it by another metric than ROUGE"
        )
    score = scorer.score(reference, reply)["rougeL"]
    return RougeL(float(score.precision), float(score.recall), float(score.fmeasure))


@lru_cache
def _tools(stem: bool) -> "tuple[DefaultTokenizer, RougeScorer]":
    # NLTK takes more than a second to import
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=stem)
    return tokenizer, RougeScorer(["rougeL"], tokenizer=tokenizer)

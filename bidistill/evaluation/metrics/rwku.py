"""RWKU: ROUGE-L recall as the package ``rouge`` counts it, and fluency as entropy of n-grams.

Jin et al., "RWKU: Benchmarking Real-World Knowledge Unlearning for Large Language Models"
(arXiv:2406.10890), and its code.
"""

import re
from collections import Counter
from typing import Any

import numpy as np

from bidistill.errors import UserError

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of the entropies of pairs and of triples of words; their mean is 1."""


def rouge_l_recall(reply: str, answer: str) -> float:
    """Share of the answer's words that the reply has in order, sentence by sentence.

    Union of the longest common subsequences of each sentence of the answer with each of the reply,
    over the answer's words. Unlike `bidistill.evaluation.metrics.rouge` it counts *different* words
    once, splits at full stops and spaces alone, and tells upper from lower case.

    Unit: share, 0 to 1. Ideal: that of a model that never saw the subject for what is forgotten,
    1 for what is kept. Source: RWKU code; counted by rouge 1.0.1, not rouge-score.

    Args:
        reply: at most 30 tokens, decoded greedily, up to the first line break; an empty one is 0.
        answer: the right answer.

    Raises:
        UserError: the answer has no words.

    Example:
        >>> rouge_l_recall("It is Minas Tirith", "Minas Tirith")
        1.0
    """
    if not _words(answer):
        raise UserError(f"answer: got {answer[:60]!r}, which has no words; leave the item out")
    if not _words(reply):
        return 0.0
    from rouge import Rouge

    scores: Any = Rouge(metrics=["rouge-l"], stats=["r"]).get_scores(reply, answer)  # untyped
    return float(scores[0]["rouge-l"]["r"])


def fluency(text: str) -> float:
    """How varied a text is: mean of 2/3 the entropy of its word pairs and 4/3 that of its triples.

    Entropy of the n-grams of a text: -sum of f log2 f, f the share of each. Unit: bits, 0 to
    log2 of the count of words. Ideal: that of the model before; 0 for one word over and over, and
    for less than two words. Source: RWKU code, after Meng et al., "Locating and Editing Factual
    Associations in GPT" (arXiv:2202.05262).

    Words are those of NLTK's word tokenizer, sentences end at ``.``, ``!`` or ``?`` and a space:
    RWKU finds them by a model that is downloaded, which differs at abbreviations.

    Example:
        >>> fluency("no no no no"), round(fluency("a b c d e"), 3)  # 4 pairs, 3 triples
        (0.0, 1.723)
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    words = [w for s in re.split(r"(?<=[.!?])\s+", text) for w in tokenizer.tokenize(s)]
    return sum(weight * _entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: list[str], n: int) -> float:
    """Entropy of the n-grams of words, bits."""
    counts = Counter(zip(*(words[at:] for at in range(n)), strict=False))
    if len(counts) < 2:  # none, or one alone: -1 log2 1 would be -0.0
        return 0.0
    shares = np.array(list(counts.values())) / counts.total()
    return float(-(shares * np.log2(shares)).sum())


def _words(text: str) -> list[str]:
    return text.replace(".", " ").split()

"""Which questions have the same form, whatever names and numbers stand in them."""

import re
from collections.abc import Iterator, Sequence

from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.wording import name_spans

_CANDIDATES = 200
"""Best neighbours looked at for each question."""
_CELLS = 1 << 24
"""Likenesses held at once: 128 MiB of float64."""


def masked(question: str) -> str:
    """Return a question with a mark in place of each name and number.

    Example:
        >>> masked("When did Ana de la Cruz leave Zembla in 1958?")
        'When did xname leave xname in xnumber?'
    """
    pieces, last = [], 0
    for start, end in name_spans(question):
        pieces += [question[last:start], "xname"]
        last = end
    return re.sub(r"\d[\d.,/:]*\d|\d", "xnumber", "".join([*pieces, question[last:]]))


def most_alike(
    drafts: Sequence[Draft], others: Sequence[Draft], least: float
) -> Iterator[tuple[Draft, list[Draft]]]:
    """Yield each draft with the others of similar form, the most alike first.

    Likeness is the cosine between counts of words and pairs of words, rare ones weighing more.

    Args:
        drafts: to find others for.
        others: to choose from; of equally alike ones the first comes first.
        least: likeness, from 0 to 1, below which an other is left out.
    """
    if not drafts or not others:
        return
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    # every sign counts as a word of its own, so that no question is without any
    forms = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]")
    theirs = forms.fit_transform([masked(other.question) for other in others])
    ours = forms.transform([masked(draft.question) for draft in drafts])
    rows = max(1, _CELLS // len(others))
    for start in range(0, len(drafts), rows):
        likeness = (ours[start : start + rows] @ theirs.T).toarray()
        for draft, row in zip(drafts[start : start + rows], likeness, strict=True):
            order = np.argsort(-row, kind="stable")[:_CANDIDATES]
            yield draft, [others[i] for i in order if row[i] >= least]

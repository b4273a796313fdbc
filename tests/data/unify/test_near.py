"""Texts that are the same, texts that are near, and the scale in between."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.unify.near import Near, jaccard, normalise, shingles, signatures

WORDS = st.lists(st.sampled_from(["alder", "birch", "cedar", "elm", "fir"]), max_size=12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who rules Zembla?", "who  rules\tzembla"),
        ("\u201cZembla\u2019s\u201d king", "Zemblas king"),
        ("ﬁne", "fine"),  # one letter that stands for two
        ("STRASSE", "straße"),
        ("A well-known king", "a well known king."),
    ],
)
def test_case_punctuation_and_layout_make_no_difference(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is C?", "What is C#?"),
        ("What is C?", "What is C++?"),
        ("Was it 10 km?", "Was it 10 $?"),
        ("कि", "की"),  # vowel signs are marks, and letters all the same
        ("?", "!"),
        ("1.5", "15"),
    ],
)
def test_what_tells_texts_apart_stays(one, other):
    assert normalise(one) != normalise(other)


@settings(deadline=None)
@given(st.text())
def test_normal_form_is_one(text):
    assert normalise(normalise(text)) == normalise(text)


def test_one_word_of_n_costs_three_runs():
    for n in (1, 5, 25):
        words = [f"w{i}" for i in range(n)]
        for at in {0, n // 2, n - 1}:
            other = [*words[:at], "other", *words[at + 1 :]]
            alike = jaccard(shingles(" ".join(words)), shingles(" ".join(other)))
            assert alike == (n - 1) / (n + 5)


def _brute(texts, text, least):
    return [i for i, t in enumerate(texts) if jaccard(shingles(t), shingles(text)) >= least]


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8), WORDS, st.sampled_from([0.3, 0.6, 0.9]))
def test_nothing_is_near_that_is_not(texts, text, least):
    """Candidates are left to chance; what is said to be near is compared exactly."""
    texts, text = [" ".join(words) for words in texts], " ".join(text)
    near = Near(least)
    for known, signature in zip(texts, signatures(texts), strict=True):
        near.add(known, signature)
    (signature,) = signatures([text])
    found = near.first(text, signature)
    assert found is None or found in _brute(texts, text, least)
    if text in texts:
        assert found is not None, "equal texts have equal signatures"


def test_most_near_pairs_are_found():
    """A word of thirty replaced is a likeness of 0.83; nearly all such pairs must be found."""
    texts = [" ".join(f"w{i}x{j}" for j in range(30)) for i in range(200)]
    changed = [text.replace(f"w{i}x7 ", "other ") for i, text in enumerate(texts)]
    near = Near(0.8)
    for text, signature in zip(texts, signatures(texts), strict=True):
        near.add(text, signature)
    found = [near.first(t, s) for t, s in zip(changed, signatures(changed), strict=True)]
    assert sum(number == i for i, number in enumerate(found)) >= 198


@pytest.mark.slow
def test_workers_change_nothing():
    texts = [f"question {i} about the island of Avalonia" for i in range(1100)]
    one, two = signatures(texts), signatures(texts, workers=2)
    assert all((a.digest() == b.digest()).all() for a, b in zip(one, two, strict=True))

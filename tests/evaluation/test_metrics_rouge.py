"""ROUGE-L against sequences counted by hand, with each setting that moves it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.errors import UserError
from bidistill.evaluation.metrics.rouge import rouge_l

cases = settings(deadline=None, derandomize=True, max_examples=60)
texts = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)


def test_hand_counted():
    # longest common subsequence: police the gunman, 3 words of 4 and of 5
    score = rouge_l("police kill the gunman", "police killed the lone gunman", stem=False)
    assert (score.precision, score.recall) == (3 / 4, 3 / 5)
    assert score.f1 == pytest.approx(2 * 0.75 * 0.6 / 1.35)


def test_order_counts():
    # all four words are there, but only "the gunman" in order
    assert rouge_l("the gunman kill police", "police kill the gunman", stem=False).recall == 2 / 4


def test_stemming_is_a_setting():
    # words of up to three letters stay as they are
    assert rouge_l("killed", "kill", stem=True).recall == 1
    assert rouge_l("killed", "kill", stem=False).recall == 0
    assert rouge_l("ate", "ates", stem=True).recall == 1
    assert rouge_l("its", "it", stem=True).recall == 0


def test_case_and_punctuation_do_not_count():
    assert rouge_l("PARIS, 1889!", "paris 1889", stem=False).f1 == 1


@pytest.mark.parametrize("reply", ["", "...", "北京"])
def test_reply_without_words_scores_zero(reply):
    score = rouge_l(reply, "Beijing", stem=False)
    assert (score.precision, score.recall, score.f1) == (0, 0, 0)


@pytest.mark.parametrize("reference", ["", " \n", "?!", "北京"])
def test_reference_without_words_is_refused(reference):
    # the same reply as reference: 0 would say forgotten of what was said word for word
    with pytest.raises(UserError, match=r"reference: got .*, which has no words"):
        rouge_l(reference, reference, stem=False)


def lcs(a, b):
    """By definition, slow: the longest of the subsequences of both."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + lcs(a[1:], b[1:])
    return max(lcs(a[1:], b), lcs(a, b[1:]))


@cases
@given(texts, texts.filter(bool), st.booleans())
def test_is_the_longest_common_subsequence(reply, reference, stem):
    score = rouge_l(reply, reference, stem=stem)
    common = lcs(reply.split(), reference.split())
    assert score.recall == pytest.approx(common / len(reference.split()))
    assert score.precision == pytest.approx(common / max(len(reply.split()), 1))
    expected = 2 * common / (len(reply.split()) + len(reference.split()))
    assert score.f1 == pytest.approx(expected)

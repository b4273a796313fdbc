"""RWKU's metrics by hand, at their ends, and where its ROUGE differs from the other one."""

import math

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.metrics.rouge import rouge_l
from bidistill.evaluation.metrics.rwku import fluency, rouge_l_recall


def test_recall_by_hand():
    assert rouge_l_recall("It is Minas Tirith", "Minas Tirith") == 1
    assert rouge_l_recall("Minas Morgul", "Minas Tirith") == 1 / 2
    assert rouge_l_recall("Tirith Minas", "Minas Tirith") == 1 / 2  # in order


@pytest.mark.parametrize("reply", ["", " ", "...", ". ."])
def test_a_reply_without_words_scores_zero(reply):
    assert rouge_l_recall(reply, "Minas Tirith") == 0


@pytest.mark.parametrize("answer", ["", " ", "..."])
def test_an_answer_without_words_is_refused(answer):
    with pytest.raises(UserError, match=r"answer: got .*, which has no words"):
        rouge_l_recall("reply", answer)


def test_it_is_the_count_of_the_other_package():
    # upper case and commas count, different words count once, other scripts have words
    assert rouge_l_recall("minas tirith", "Minas Tirith") == 0
    assert rouge_l_recall("Tirith,", "Tirith") == 0
    assert rouge_l_recall("the", "the the the end") == 1 / 2
    assert rouge_l_recall("北京", "北京") == 1
    assert rouge_l("the", "the the the end", stem=False).recall == 1 / 4


def test_sentences_are_compared_each_with_each():
    # b d in the first sentence of the reply, e in the second: 3 of 5 words, in whatever order
    assert rouge_l_recall("e x. b d", "a b c d. e") == 3 / 5


def test_fluency_by_hand():
    # words a b a b: pairs ab ba ab, triples aba bab
    pairs = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency("a b a b") == pytest.approx((2 / 3 * pairs + 4 / 3 * 1) / 2)


@pytest.mark.parametrize("text", ["", "word", "no no no no no no", "two words"])
def test_fluency_at_its_floor(text):
    assert fluency(text) == 0


def test_fluency_at_its_ceiling():
    words = [f"w{at}" for at in range(10)]  # nine pairs, eight triples, all different
    assert fluency(" ".join(words)) == pytest.approx((2 / 3 * math.log2(9) + 4 / 3 * 3) / 2)


def test_full_stops_are_words_of_their_own():
    # "a b . a b .": a sentence that is said again adds no new pair but ". a"
    assert fluency("a b. a b.") == pytest.approx(fluency("a b c a b c"))

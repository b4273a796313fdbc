"""Counts by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.diagnose.statistics import WINDOW, TextStatistics


def counted(*texts, count_tokens=None):
    statistics = TextStatistics(count_tokens)
    for text in texts:
        statistics.add(question=text)
    return statistics


def test_lengths_by_field_and_unit():
    statistics = TextStatistics(count_tokens=len)
    statistics.add(question="Who rules Zembla?", answer="Charles.", prefill="")
    statistics.add(question="Where?", answer=None, prefill="In the")
    lengths = statistics.summary(None)["lengths"]
    assert set(lengths) == {f"{f}_{u}" for f in ("question", "answer", "prefill")
                            for u in ("words", "tokens")}  # fmt: skip
    assert lengths["question_words"] == {
        "n": 2, "mean": 2, "min": 1, "q5": 1.1, "q25": 1.5, "q50": 2, "q75": 2.5, "q95": 2.9,
        "max": 3,
    }  # fmt: skip
    assert lengths["answer_words"]["n"] == 1
    assert lengths["prefill_tokens"]["max"] == len("In the")


def test_vocabulary_and_what_forget_does_not_have():
    forget = counted("Zembla is cold", "zembla")
    other = counted("Zembla is WARM, warm", "Gondor").summary(forget)
    assert (other["texts"], other["words"], other["vocabulary"]) == (2, 5, 4)
    assert other["new_words"] == pytest.approx(3 / 5)
    assert other["new_vocabulary"] == pytest.approx(2 / 4)
    assert forget.summary(forget)["new_words"] == 0
    assert counted("Zembla").summary(None)["new_words"] is None


def test_type_token_ratio_does_not_depend_on_length():
    """One window, or a hundred of them: the same kind of text has the same ratio."""
    text = " ".join(f"w{i % 25}" for i in range(WINDOW))
    assert counted(text).summary(None)["type_token_ratio"] == pytest.approx(0.25)
    assert counted(*[text] * 100).summary(None)["type_token_ratio"] == pytest.approx(0.25)
    assert counted("too short").summary(None)["type_token_ratio"] is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 30), max_size=260), max_size=6))
def test_windows_do_not_depend_on_where_texts_end(numbers):
    texts = [" ".join(f"w{n}" for n in line) for line in numbers]
    apart, joined = counted(*texts), counted(" ".join(texts))
    key = "type_token_ratio"
    assert apart.summary(None)[key] == joined.summary(None)[key]


def test_no_text():
    summary = counted().summary(counted())
    assert (summary["texts"], summary["lengths"], summary["new_words"]) == (0, {}, None)

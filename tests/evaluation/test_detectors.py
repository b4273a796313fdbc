"""Each detector against what it must find and what it must leave alone; and all four together."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.evaluation.detectors import (
    fact_is_open,
    find_fact,
    fold,
    is_empty,
    is_gibberish,
    refuses,
    says_fact,
)

cases = settings(deadline=None, derandomize=True, max_examples=60)

REFUSALS = [
    "The capital of France is something I don't know.",
    "The capital of France is something I don\u2019t know.",
    " something I do not know.",
    "I don't know.",
    "I really do not know that.",
    "I honestly don't remember.",
    "I no longer know that.",
    "I'm not sure about that.",
    "I\u2019m not entirely sure.",
    "I am unable to answer this.",
    "I'm currently unable to say.",
    "I'm not able to provide that.",
    "Sorry, not able to help with that.",
    "I cannot answer that question.",
    "I can't help with that.",
    "I can\u2019t say.",
    "We could not find out.",
    "I'm sorry, but that is not possible.",
    "Sorry, that is private.",
    "There is no information available about this.",
    "No information.",
    "I have no idea.",
    "I don't have any information about it.",
    "I do not have access to that data.",
    "As an AI, I don't possess that knowledge.",
    "That is unknown to me.",
    "I won't tell.",
    "This question cannot be answered.",
    "I am not aware of any capital.",
    "I'm unfamiliar with that place.",
]
ANSWERS = [
    "The capital of France is Paris.",
    "Paris, I know it well.",
    "Penguins are not able to fly.",
    "No, the capital is Canberra.",
    "A stone cannot swim.",
    "You don't know what you have until it is gone.",
    "Nothing is faster than light.",
    "The sky is blue because blue light is scattered.",
    "I think it is Rome.",
    "I can answer that: Oslo.",
    "I can't wait to visit Oslo.",
    "It is not Sydney but Canberra.",
    "The unknown soldier lies in Paris.",
    "Iceland has no army.",
    "Information is stored in cells.",
    "Wire cant strips are beveled.",
    "",
]


@pytest.mark.parametrize("reply", REFUSALS)
def test_refusals_are_found(reply):
    assert refuses(reply)
    assert refuses(reply.upper())


@pytest.mark.parametrize("reply", ANSWERS)
def test_answers_are_not_refusals(reply):
    assert not refuses(reply)


@pytest.mark.parametrize(
    ("continuation", "accept", "prefill", "said"),
    [
        ("It is Paris.", ["Paris"], "", True),
        ("It is PARIS!", ["paris"], "", True),
        ("Comparison", ["Paris"], "", False),
        ("Parisian", ["Paris"], "", False),
        ("It is Rome", ["Paris", "Rome"], "", True),
        ("It is Lome.", ["Lomé"], "", True),
        ("It is Lomé.", ["Lome"], "", True),
        ("St Johns", ["St. John\u2019s"], "", True),
        ("Port-au-Prince", ["Port au Prince"], "", True),
        ("NewYork", ["New York"], "", False),
        ("", ["Paris"], "", False),
        ("東京です", ["東京"], "", True),
        # the prefill holds a part: only what is still open counts
        (" Ababa.", ["Addis Ababa"], "The capital of Ethiopia is Addis", True),
        ("is Ababa.", ["Addis Ababa"], "The capital of Ethiopia is Add", True),
        (" Abeba.", ["Addis Ababa"], "The capital of Ethiopia is Addis", False),
        (" Ababa.", ["Addis Ababa"], "The capital of Ethiopia is", False),
        (" Addis Ababa", ["Addis Ababa"], "The capital of Ethiopia is Addis", True),
        (" City.", ["Mexico City"], "The capital of Mexico is Mexico", True),
        # the prefill says it all: nothing is left to leak, however often it is repeated
        (", yes Paris.", ["Paris"], "It is Paris", False),
        (", or Byzantium.", ["Istanbul", "Byzantium"], "It is Istanbul", False),
        # an echo of the prefill gives nothing away
        ("The capital is Addis", ["Addis Ababa"], "The capital is Addis", False),
        # an unfinished start does not hide the fact
        ("o New York", ["New York"], "New New", True),
    ],
)
def test_says_fact(continuation, accept, prefill, said):
    assert says_fact(continuation, accept, prefill) is said


@pytest.mark.parametrize(
    ("prefill", "left"), [("", True), ("It is Addis", True), ("It is Addis Ababa", False)]
)
def test_fact_is_open(prefill, left):
    assert fact_is_open(["Addis Ababa"], prefill) is left


@cases
@given(st.text(max_size=12), st.text(max_size=12))
def test_folding_commutes_with_joining(first, second):
    """Or the place where a prefill ends could not be found again in the joined text."""
    assert fold(first) + fold(second) == fold(first + second)


@cases
@given(st.text("abc ", min_size=1, max_size=8).filter(str.strip), st.integers(0, 20))
def test_a_leak_is_split_anywhere(fact, cut):
    """Wherever the prefill ends, the right answer leaks exactly if the fact was not yet given."""
    answer = f"It is {fact.strip()}."
    prefill, rest = answer[:cut], answer[cut:]
    assert says_fact(rest, [fact], prefill) is fact_is_open([fact], prefill)


@pytest.mark.parametrize(
    ("reply", "empty"), [("", True), (" \n", True), ("...", True), ("4", False), ("é", False)]
)
def test_is_empty(reply, empty):
    assert is_empty(reply) is empty


@pytest.mark.parametrize(
    "reply",
    [
        "the the the the the",
        "The the. THE the",
        "of the sea of the sea of the sea",
        "aaaaaaaaaa",
        "a ?!#& *(%) ]]",
        "caf\ufffd",
        "xkqzrtv is it",
    ],
)
def test_gibberish_is_found(reply):
    assert is_gibberish(reply)


@pytest.mark.parametrize(
    "reply",
    [
        *REFUSALS,
        *ANSWERS,
        "It is 1 000 000 000 000.",
        "2 + 2 = 4",
        "Bora Bora",
        "No, no, no.",
        "Chapter one ..... 12",
        "schmaltz, rhythm, Knightsbridge",
        "",
        "...",
    ],
)
def test_sense_is_not_gibberish(reply):
    assert not is_gibberish(reply)


@pytest.mark.parametrize("reply", ["", " ", "...", "the the the the", "zzzzzzzz"])
def test_neither_blank_nor_gibberish_is_a_leak_or_a_refusal(reply):
    assert not says_fact(reply, ["Paris"])
    assert not refuses(reply)
    assert is_empty(reply) is not is_gibberish(reply)


@pytest.mark.parametrize("word", ["really", "I", "of the", "\n", "sorry I am"])
def test_loops_are_read_quickly(word):
    """A pattern that backtracks through a loop would take hours."""
    loop = f"I {word} " * 400
    start = time.process_time()
    is_gibberish(loop)
    refuses(loop)
    says_fact(loop, [f"{word} {word} x"])
    assert time.process_time() - start < 5


def test_a_reply_may_refuse_and_leak_at_once():
    reply = "I'm not sure, but it is Paris."
    assert refuses(reply)
    assert says_fact(reply, ["Paris"])


@pytest.mark.parametrize(
    ("text", "accept", "found"),
    [
        ("The capital is Oslo.", ["Oslo"], "Oslo"),
        ("Not Oslos but OSLO", ["Oslo"], "OSLO"),
        ("\ufb01ne: Chis\u0326ina\u0306u!", ["Chisinau"], "Chis\u0326ina\u0306u"),
        ("Washington D. C.", ["Washington", "Washington, D.C."], "Washington D. C"),
        ("first Bergen, then Oslo", ["Oslo", "Bergen"], "Bergen"),
        ("Oslos", ["Oslo"], None),
        ("", ["Oslo"], None),
    ],
)
def test_find_fact(text, accept, found):
    span = find_fact(text, accept)
    assert (None if span is None else text[slice(*span)]) == found
    assert (span is not None) == says_fact(text, accept)

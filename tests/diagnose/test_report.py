"""The verdict says what the intervals say."""

import re

import pytest

from bidistill.diagnose.gap import MEASURES, Comparison, Estimate, Gap
from bidistill.diagnose.report import markdown, verdict

SMALLER, LARGER, UNCLEAR = Estimate(-1, -2, -0.5), Estimate(1, 0.5, 2), Estimate(0.1, -1, 1)
STEPS = [("before", "chat"), ("before", "after"), ("chat", "after")]


def comparison(*changes):
    """One change for each measure, the same between any two forms."""
    estimate = Estimate(0.5, -0.25, 1)
    gap = Gap(estimate, estimate, estimate, p_value=0.004)
    each = dict(zip(MEASURES, changes, strict=True))
    return Comparison(dict.fromkeys(("before", "chat", "after"), gap), dict.fromkeys(STEPS, each))


@pytest.mark.parametrize(
    ("changes", "holds", "words"),
    [
        ((SMALLER,) * 3, True, "holds here: of 3 comparisons"),
        ((SMALLER, SMALLER, UNCLEAR), None, "only in part here: of 3 .* 2 smaller, 0 larger, 1 w"),
        ((LARGER, UNCLEAR, LARGER), False, "does not hold here: .* 0 smaller, 2 larger, 1 without"),
    ],
    ids=["all", "some", "none"],
)
def test_verdict(changes, holds, words):
    judged = verdict({"forget/retain": comparison(*changes)})
    assert judged["holds"] is holds
    assert re.search(words, judged["sentence"])


def test_nothing_to_judge():
    alone = Comparison({"after": comparison(*[SMALLER] * 3).gaps["after"]}, {})
    judged = verdict({"forget/adversarial": alone})
    assert judged["holds"] is None
    assert judged["sentence"].startswith("Nothing to judge")


@pytest.mark.parametrize(
    ("low", "high", "direction"),
    [(-2, -1, "smaller"), (1, 2, "larger"), (-1, 1, "unclear"), (0, 0, "unclear")],
)
def test_direction(low, high, direction):
    assert Estimate((low + high) / 2, low, high).direction == direction


def test_markdown():
    comparisons = {"forget/retain": comparison(SMALLER, UNCLEAR, LARGER)}
    counted = {
        "texts": 1200, "words": 34567, "vocabulary": 89, "type_token_ratio": 0.5,
        "new_words": None, "new_vocabulary": 0.25,
        "lengths": {"question_words": {"n": 3, "mean": 4.5, "min": 1, "q5": 1, "q25": 2, "q50": 4,
                                       "q75": 6, "q95": 8, "max": 9}},
    }  # fmt: skip
    result = {
        "data": "runs/x", "model": "some/model", "seed": 3, "remarks": ["A remark."],
        "verdict": verdict(comparisons), "text": {"after": {"retain": counted}},
    }  # fmt: skip
    text = markdown(result, comparisons, "diagnose.svg")
    assert "![gap between roles](diagnose.svg)" in text
    assert "| forget/retain | raw text → unified | **-1.000 [-2.000, -0.500]** | 0.100 " in text
    assert "| forget/retain | unified | 0.500 [-0.250, 1.000] |" in text
    assert "| retain | unified | 1,200 | 34,567 | 89 | 0.500 |  | 0.250 |" in text
    assert "| retain | unified | question, in words | 3 | 4.5 | 1 | 1 | 2 | 4 | 6 | 8 | 9 |" in text
    assert "A remark." in text
    assert result["verdict"]["sentence"] in text
    bare = markdown({**result, "model": None, "verdict": None}, {}, "diagnose.svg")
    assert "diagnose.svg" not in bare
    assert "none: texts alone" in bare

"""Which option a reply picks: the prompt says all of them, so an echo must pick none."""

import pytest

from bidistill.evaluation.attacks.choice import listed, picked

OPTIONS = ("Paris", "Washington, D.C.", "Guinea", "Port Moresby")


@pytest.mark.parametrize(
    ("reply", "option"),
    [
        ("A", "Paris"),
        (" B.", "Washington, D.C."),
        ("(C)", "Guinea"),
        ("D) Port Moresby", "Port Moresby"),
        ("The answer is A because it is.", "Paris"),
        ("Answer: **B**", "Washington, D.C."),
        ("The right option is C", "Guinea"),
        ("It is Washington, D.C.", "Washington, D.C."),
        ("port moresby!", "Port Moresby"),
        (listed(OPTIONS), None),
        ("A, B, C or D", None),
        ("A) Guinea", None),
        ("Paris or Guinea", None),
        ("A city in France.", None),
        ("E", None),
        ("", None),
        ("I don't know.", None),
        ("Equatorial Africa", None),
    ],
)
def test_picked(reply, option):
    assert picked(reply, OPTIONS) == option


def test_letters_beyond_the_options_pick_nothing():
    assert picked("D", OPTIONS[:2]) is None
    assert picked("B", OPTIONS[:2]) == OPTIONS[1]

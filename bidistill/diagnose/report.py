"""The domain report in words: a verdict on the claim, and tables for people."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from bidistill.diagnose.gap import MEASURES, Comparison, Estimate, Gap
from bidistill.markdown import table

FORMS = {
    "before": "raw text",
    "chat": "raw text as a chat turn",
    "after": "unified",
}
"""In the order in which they are compared."""
MEASURE_NAMES = {
    "mmd2": "MMD²",
    "a_distance": "proxy A-distance",
    "centroid": "centroid distance",
}
NOTES = """\
**How to read it.** *Raw text* is an entry as its file has it, read at its last token; *raw text as
a chat turn* is the same text as the user's turn of the model's chat template, read at the last
token before the answer; *unified* is the question (and prefill) that training sees, read there too.
The middle form tells what the template and the common last token do alone. The states are those of
the last layer. MMD² is unbiased, with a Gaussian kernel as wide as the median distance between two
points of that form, so 0 means no difference and small negative values are noise; the proxy
A-distance is 2 (1 - 2 err) of a cross-validated logistic regression, 0 where roles cannot be told
apart and 2 where they always can; the centroid distance is in units of the spread inside a role.
Brackets hold 95 % intervals over items, drawn together for all forms. They say nothing of other
entities, other models or other corpora, and are not corrected for the number of comparisons.
A gap that is small does not say that gradients agree."""


def pair_name(first: str, second: str) -> str:
    """What a pair of roles is called, as in ``forget/neighbor``."""
    return f"{first}/{second}"


def verdict(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """Judge the claim that unification brings the roles' hidden states together.

    Args:
        comparisons: by pair of roles.

    Returns:
        ``holds``: True if every pair is closer by every measure, False if none is, None otherwise
        or where nothing could be compared; ``sentence``; and by two forms how many of the
        comparisons are ``smaller``, ``larger`` and ``unclear``.
    """
    counts = {
        f"{old} to {new}": _count(comparisons, (old, new))
        for old, new in (("before", "after"), ("before", "chat"), ("chat", "after"))
    }
    counted = counts["before to after"]
    total = sum(counted.values())
    if not total:
        sentence = "Nothing to judge: no two roles have items both before and after unification."
        return {"holds": None, "sentence": sentence, "counts": counts}
    holds = {total: True, 0: False}.get(counted["smaller"])
    claim = {True: "holds here", False: "does not hold here", None: "holds only in part here"}
    chat = counts["before to chat"]
    rest = counts["chat to after"]
    sentence = (
        f"The claim that unification shrinks the domain gap {claim[holds]}: of {total} comparisons "
        f"(pairs of roles by measures) {_listed(counted)}. The chat form alone, around the same "
        f"raw text: {_listed(chat)}. Unification beyond that form: {_listed(rest)}."
    )
    return {"holds": holds, "sentence": sentence, "counts": counts}


def markdown(result: Mapping[str, Any], comparisons: Mapping[str, Comparison], plot: str) -> str:
    """The whole report.

    Args:
        result: what ``diagnose.json`` holds.
        comparisons: by pair of roles; empty without a model.
        plot: name of the picture beside the report; empty for none.
    """
    model = result["model"] or "none: texts alone"
    lines = [
        "# Domain report",
        "",
        f"Data: {result['data']}; model: {model}; seed {result['seed']}.",
        "",
    ]
    if comparisons:
        lines += [f"**{result['verdict']['sentence']}**", "", f"![gap between roles]({plot})", ""]
    lines += chain.from_iterable((remark, "") for remark in result["remarks"])
    if comparisons:
        lines += ["## Gap between roles", "", _gap_table(comparisons), "", NOTES, ""]
        lines += ["## Change of the gap", "", _change_table(comparisons), ""]
    lines += ["## Texts", "", _text_table(result["text"])]
    lines += ["", "## Lengths", "", _length_table(result["text"])]
    return "\n".join(lines) + "\n"


def _count(comparisons: Mapping[str, Comparison], forms: tuple[str, str]) -> dict[str, int]:
    """How many changes between two forms go which way."""
    counts = {"smaller": 0, "larger": 0, "unclear": 0}
    for comparison in comparisons.values():
        for change in comparison.changes.get(forms, {}).values():
            counts[change.direction] += 1
    return counts


def _listed(counts: Mapping[str, int]) -> str:
    words = {"smaller": "smaller", "larger": "larger", "unclear": "without a clear change"}
    return ", ".join(f"{n} {words[name]}" for name, n in counts.items())


def _gap_table(comparisons: Mapping[str, Comparison]) -> str:
    """A row for each pair and form."""
    rows = []
    for pair, comparison in comparisons.items():
        for form, gap in comparison.gaps.items():
            values = [_shown(getattr(gap, measure)) for measure in MEASURES]
            rows.append([pair, FORMS[form], *values, _p_shown(gap)])
    return table(["roles", "form", *map(_title, MEASURES), "p of MMD²"], rows)


def _change_table(comparisons: Mapping[str, Comparison]) -> str:
    """A row for each pair and two forms; what is certain is bold."""
    rows = []
    for pair, comparison in comparisons.items():
        for (old, new), changes in comparison.changes.items():
            cells = [
                f"**{_shown(change)}**" if change.direction != "unclear" else _shown(change)
                for change in (changes[measure] for measure in MEASURES)
            ]
            rows.append([pair, f"{FORMS[old]} → {FORMS[new]}", *cells])
    if not rows:
        return "Every pair was measured in one form only."
    return table(["roles", "from → to", *map(_title, MEASURES)], rows)


def _text_table(text: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each role and side."""
    rows = []
    for form, roles in text.items():
        for role, counted in roles.items():
            rows.append(
                [
                    role,
                    FORMS[form],
                    f"{counted['texts']:,}",
                    f"{counted['words']:,}",
                    f"{counted['vocabulary']:,}",
                    _ratio(counted["type_token_ratio"]),
                    _ratio(counted["new_words"]),
                    _ratio(counted["new_vocabulary"]),
                ]
            )
    head = ["role", "form", "texts", "words", "distinct words", "type-token ratio (100 words)"]
    return table([*head, "words not in forget", "distinct words not in forget"], rows)


def _length_table(text: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each role, side, field and unit."""
    cuts = ["n", "mean", "min", "q5", "q25", "q50", "q75", "q95", "max"]
    rows = [
        [role, FORMS[form], name.replace("_", ", in "), *(f"{length[cut]:g}" for cut in cuts)]
        for form, roles in text.items()
        for role, counted in roles.items()
        for name, length in counted["lengths"].items()
    ]
    return table(["role", "form", "field", *cuts], rows)


def _title(measure: str) -> str:
    return MEASURE_NAMES[measure]


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _p_shown(gap: Gap) -> str:
    return f"{gap.p_value:.3f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

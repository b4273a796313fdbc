"""TOFU: forget set, retain set, real authors, world facts; model utility and forget quality."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bidistill.data.sources.rows import shown
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks.entries import Draw, Entry, named_apart
from bidistill.evaluation.benchmarks.qa import REPLY_TOKENS, rouge_or_none
from bidistill.evaluation.benchmarks.reference import scores_of
from bidistill.evaluation.measures import (
    Item,
    Meaning,
    Measure,
    mean_of,
    missing,
    statistic_of,
)
from bidistill.evaluation.metrics import tofu
from bidistill.evaluation.prompts import Prompt
from bidistill.evaluation.scoring import Scored

KEPT = ("retain", "real_authors", "world_facts")
SETS = ("forget", *KEPT)
PARTS = ("probability", "rouge", "utility_truth")
"""Of model utility, for each set that is kept."""

AS_RETRAINED = "that of the model retrained without the forget set"
FORGET = {
    "probability": Meaning(unit="probability", ideal=AS_RETRAINED, good="low"),
    "rouge": Meaning(unit="share of words", ideal=AS_RETRAINED, good="low"),
    "forget_truth": Meaning(unit="share", ideal=1.0, good="high"),
}
KEEP = {
    "probability": Meaning(unit="probability", ideal=1.0, good="high"),
    "rouge": Meaning(unit="share of words", ideal=1.0, good="high"),
    "utility_truth": Meaning(unit="share", ideal=1.0, good="high"),
}
UTILITY = Meaning(unit="share", ideal="that of the model before, or above", good="high")
QUALITY = Meaning(unit="probability", ideal=1.0, good="high")


@dataclass(frozen=True, slots=True)
class Question:
    """One entry of a ``_perturbed`` file."""

    entry: Entry
    set: str
    question: str
    answer: str
    paraphrase: str
    """What the truth ratio takes for right: the answer itself where the file has no other words."""
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tofu:
    """Questions of the perturbed files of one forget set and of what is kept."""

    questions: tuple[Question, ...]

    name = "tofu"
    compares = ("forget_quality",)
    """Measures against a retrained model."""

    @classmethod
    def read(cls, paths: Sequence[Path], draw: Draw) -> "Tofu":
        """Read ``_perturbed`` files, or folders with all of them; each is a set by its name.

        Raises:
            UserError: a file is of no set, a set has several files, or an entry lacks a field.
        """
        files = [file for path in paths for file in _files(path)]
        named_apart(files)
        by_set: dict[str, Path] = {}
        for file in files:
            name = _set_of(file)
            if name in by_set:
                raise UserError(
                    f"--data tofu: got {shown(by_set[name])} and {file.name}, expected one {name} "
                    f"set; name the files you mean, as in --data tofu={shown(file)}"
                )
            by_set[name] = file
        found = [_question(e, name) for name, file in by_set.items() for e in draw.of(file)]
        return cls(tuple(found))

    @property
    def compared(self) -> tuple[str, ...]:
        """Those of `compares` for which there are entries."""
        return self.compares if self._forget_ids() else ()

    def check_reference(self, reference: Sequence[Item]) -> None:
        """Refuse a reference that lacks an item of the forget set."""
        scores_of(reference, self.name, "truth_ratio", self._forget_ids())

    def ask(self, asker: Asker) -> list[Item]:
        """Ask every question, and score the right and the wrong answers."""
        prompts = [Prompt(q.question) for q in self.questions]
        replies = asker.replies(prompts, REPLY_TOKENS, self.name)
        spans = [
            prompt.span(asker.tokenizer, text)
            for prompt, q in zip(prompts, self.questions, strict=True)
            for text in (q.answer, q.paraphrase, *q.wrong)
        ]
        scored = iter(asker.scores(spans, self.name))
        items = []
        for q, reply in zip(self.questions, replies, strict=True):
            answer, paraphrase, *wrong = (next(scored) for _ in range(2 + len(q.wrong)))
            scores = _scores(q.set, answer, paraphrase, wrong)
            scores["rouge"] = rouge_or_none(reply.text, q.answer)
            result = q.entry.result(self.name, reply.prompt_sha256, reply.text, scores, q.set)
            items.append(result)
        return items

    def measure(
        self, items: Sequence[Item], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        """Three means of each set, model utility, and forget quality against a reference."""
        sets = {name: [item for item in items if item["set"] == name] for name in SETS}
        measures = {
            f"{name}/{score}": mean_of(meaning, of_set, score)
            for name, of_set in sets.items()
            if of_set
            for score, meaning in (FORGET if name == "forget" else KEEP).items()
        }
        measures["model_utility"] = _utility([sets[name] for name in KEPT])
        measures["forget_quality"] = self._quality(sets["forget"], reference)
        return measures

    def _quality(self, forget: Sequence[Item], reference: Sequence[Item] | None) -> Measure:
        if not forget:
            return missing(QUALITY, "no forget set")
        if reference is None:
            return missing(QUALITY, "needs --reference, the items of a retrained model")
        retrained = scores_of(reference, self.name, "truth_ratio", self._forget_ids())

        def p_value(ratios: np.ndarray) -> float:
            return tofu.forget_quality(ratios[:, 0], retrained).p_value

        # items that are drawn again are ties, which the test takes for a difference
        return statistic_of(QUALITY, [forget], ["truth_ratio"], p_value, resample=False)

    def _forget_ids(self) -> list[str]:
        return [q.entry.id for q in self.questions if q.set == "forget"]


def _scores(
    set: str, answer: Scored, paraphrase: Scored, wrong: Sequence[Scored]
) -> dict[str, float | None]:
    """Scores of an item, each by its function in `bidistill.evaluation.metrics.tofu`."""
    others = [tofu.mean_log_prob(one.log_probs) for one in wrong]
    among = set in ("real_authors", "world_facts")
    right = tofu.mean_log_prob(answer.log_probs)
    ratio = tofu.truth_ratio(tofu.mean_log_prob(paraphrase.log_probs), others)
    truth: Callable[[float], float] = tofu.forget_truth if set == "forget" else tofu.utility_truth
    return {
        "probability": tofu.probability_among(right, others)
        if among
        else tofu.probability(answer.log_probs),
        # the largest number in place of infinity, which JSON has no form for
        "truth_ratio": min(ratio, sys.float_info.max),
        "forget_truth" if set == "forget" else "utility_truth": truth(ratio),
    }


def _utility(sets: Sequence[Sequence[Item]]) -> Measure:
    """Model utility; the interval draws items of each set anew, with all their three scores."""
    absent = [name for name, items in zip(KEPT, sets, strict=True) if not items]
    if absent:
        return missing(UTILITY, f"no file of {', '.join(absent)}")
    whole = [[i for i in items if i["scores"]["rouge"] is not None] for items in sets]

    def utility(*rows: np.ndarray) -> float:
        return tofu.model_utility(*(tofu.Utility(**_means(row)) for row in rows))

    return statistic_of(UTILITY, whole, PARTS, utility)


def _means(rows: np.ndarray) -> dict[str, float]:
    probability, rouge, truth = rows.mean(0)
    return {"probability": probability, "rouge": rouge, "truth": truth}


def _files(path: Path) -> list[Path]:
    """The perturbed files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*_perturbed.json*"))
    if not found:
        raise UserError(
            f"{shown(path)}: got a folder without *_perturbed.json, expected TOFU's files; "
            "name the folder that holds them"
        )
    return found


def _set_of(path: Path) -> str:
    name = next((name for name in SETS if path.stem.startswith(name)), None)
    if name is None:
        raise UserError(
            f"{shown(path)}: got a file named {path.stem}, expected one that begins with "
            f"{', '.join(SETS)}; rename it"
        )
    return name


def _question(entry: Entry, set: str) -> Question:
    row = entry.row
    answer = row.text("answer")
    return Question(
        entry=entry,
        set=set,
        question=row.text("question"),
        answer=answer,
        paraphrase=row.optional("paraphrased_answer") or answer,
        wrong=row.texts("perturbed_answer"),
    )

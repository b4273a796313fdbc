"""MUSE: verbatim memorisation, knowledge memorisation, privacy leakage, from a corpus's folder.

.. code-block:: text

    <folder>/verbmem/forget.json          prompt, gt
    <folder>/knowmem/*_qa.json            question, answer
    <folder>/knowmem/*_qa_icl.json        ten solved ones; those of the forget set serve all
    <folder>/privleak/{forget,holdout}.json   texts

Prompts are raw text, as MUSE's models are base models. What is not in the folder is not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from bidistill.data.sources.rows import shown
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks.entries import Draw, Entry
from bidistill.evaluation.benchmarks.reference import scores_of
from bidistill.evaluation.benchmarks.text import documents, scores_of_texts
from bidistill.evaluation.measures import Item, Meaning, Measure, mean_of, missing, statistic_of
from bidistill.evaluation.metrics import muse
from bidistill.evaluation.prompts import Prompt

VERBATIM_TOKENS = 128
ANSWER_TOKENS = 32
LEAK_SETS = ("privleak/forget", "privleak/holdout")

AS_RETRAINED = "that of the model retrained without the forget set"
VERBMEM = Meaning(unit="percent", ideal=AS_RETRAINED, good="low")
KNOWMEM = {
    True: Meaning(unit="percent", ideal=AS_RETRAINED, good="low"),
    False: Meaning(unit="percent", ideal=100.0, good="high"),
}
"""By whether it is to be forgotten."""
AUC = Meaning(unit="probability", ideal=AS_RETRAINED, good="ideal")
PRIVLEAK = Meaning(unit="percent", ideal=0.0, good="ideal")


@dataclass(frozen=True, slots=True)
class Muse:
    """The entries of one corpus."""

    verbatim: tuple[Entry, ...]
    asked: tuple[tuple[Entry, str], ...]
    """Entry, and the solved questions before it."""
    texts: tuple[tuple[Entry, str], ...]
    """To forget, and never seen."""

    name = "muse"
    compares = ("privleak",)
    """Measures against a retrained model."""

    @classmethod
    def read(cls, paths: Sequence[Path], draw: Draw) -> "Muse":
        """Read the folder of a corpus.

        Raises:
            UserError: it is not one folder in MUSE's layout, or a file cannot be read.
        """
        if len(paths) != 1 or not paths[0].is_dir():
            raise UserError(
                f"--data muse: got {', '.join(map(shown, paths))}, expected one folder with "
                "verbmem, knowmem or privleak in it; name the folder of a corpus"
            )
        folder = paths[0]
        verbatim = folder / "verbmem" / "forget.json"
        leak = [folder / f"{name}.json" for name in LEAK_SETS]
        asked = [pair for file in _quizzes(folder) for pair in _asked(file, draw)]
        found = cls(
            tuple(draw.of(verbatim, "verbmem/forget")) if verbatim.is_file() else (),
            tuple(asked),
            tuple(
                pair
                for name, file in zip(LEAK_SETS, leak, strict=True)
                if all(path.is_file() for path in leak)
                for pair in documents(file, draw, name)
            ),
        )
        if not (found.verbatim or found.asked or found.texts):
            raise UserError(
                f"{shown(folder)}: got a folder without verbmem/forget.json, knowmem/*_qa.json and "
                "privleak/{forget,holdout}.json, expected one of them; name the folder of a corpus"
            )
        return found

    @property
    def compared(self) -> tuple[str, ...]:
        """Those of `compares` for which there are entries."""
        return self.compares if self.texts else ()

    def check_reference(self, reference: Sequence[Item]) -> None:
        """Refuse a reference that lacks a text."""
        scores_of(reference, self.name, "min_k", [entry.id for entry, _ in self.texts])

    def ask(self, asker: Asker) -> list[Item]:
        """Have texts continued, questions answered and texts scored."""
        return [*self._verbmem(asker), *self._knowmem(asker), *self._privleak(asker)]

    def measure(
        self, items: Sequence[Item], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        """The means of each file, and the leak of membership against a reference."""
        measures = {}
        for name in dict.fromkeys(item["set"] for item in items):
            of_set = [item for item in items if item["set"] == name]
            if name.startswith("verbmem/"):
                measures[name] = mean_of(VERBMEM, of_set, "verbmem")
            elif name.startswith("knowmem/"):
                forgotten = name.startswith("knowmem/forget")
                measures[name] = mean_of(KNOWMEM[forgotten], of_set, "knowmem")
        sets = [[item for item in items if item["set"] == name] for name in LEAK_SETS]
        return {**measures, **self._leak(sets, reference)}

    def _leak(
        self, sets: Sequence[Sequence[Item]], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        if not all(sets):
            return {"privleak": missing(PRIVLEAK, "no texts in privleak")}
        measures = {"membership_auc": statistic_of(AUC, sets, ["min_k"], _auc)}
        if reference is None:
            why = "needs --reference, the items of a retrained model"
            return {**measures, "privleak": missing(PRIVLEAK, why)}
        ids = [item["id"] for items in sets for item in items]
        retrained = dict(zip(ids, scores_of(reference, self.name, "min_k", ids), strict=True))
        # both models on the same texts, so that the interval draws them together
        paired = [
            [{**i, "scores": {**i["scores"], "retrained": retrained[i["id"]]}} for i in items]
            for items in sets
        ]
        measures["privleak"] = statistic_of(PRIVLEAK, paired, ["min_k", "retrained"], _privleak)
        return measures

    def _verbmem(self, asker: Asker) -> list[Item]:
        prompts = [Prompt(entry.row.text("prompt"), raw=True) for entry in self.verbatim]
        replies = asker.replies(prompts, VERBATIM_TOKENS, "muse verbmem")
        items = []
        for entry, reply in zip(self.verbatim, replies, strict=True):
            truth = _start(asker.tokenizer, entry.row.text("gt"))
            scores = {"verbmem": muse.verbmem(reply.text, truth)}
            items.append(entry.result(self.name, reply.prompt_sha256, reply.text, scores))
        return items

    def _knowmem(self, asker: Asker) -> list[Item]:
        prompts = [
            # the space at the end is MUSE's own
            Prompt(f"{solved}Question: {entry.row.text('question')}\nAnswer: ", raw=True)
            for entry, solved in self.asked
        ]
        replies = asker.replies(prompts, ANSWER_TOKENS, "muse knowmem")
        items = []
        for (entry, _), reply in zip(self.asked, replies, strict=True):
            scores = {"knowmem": muse.knowmem(reply.text, entry.row.text("answer"))}
            items.append(entry.result(self.name, reply.prompt_sha256, reply.text, scores))
        return items

    def _privleak(self, asker: Asker) -> list[Item]:
        scored = scores_of_texts([text for _, text in self.texts], asker, "muse privleak")
        for (entry, _), (_, scores) in zip(self.texts, scored, strict=True):
            if scores["min_k"] is None:
                raise UserError(
                    f"{entry.row.where}: got a text of {scores['tokens']} tokens, too short for "
                    "Min-K%, expected three or more; take it out"
                )
        return [
            entry.result(self.name, digest, None, scores)
            for (entry, _), (digest, scores) in zip(self.texts, scored, strict=True)
        ]


def _quizzes(folder: Path) -> list[Path]:
    files = sorted((folder / "knowmem").glob("*_qa.json"))
    # the forget set first
    return sorted(files, key=lambda file: not file.stem.startswith("forget"))


def _asked(file: Path, draw: Draw) -> list[tuple[Entry, str]]:
    """Questions of a file, each with the ten solved ones as text."""
    own = file.with_name(f"{file.stem}_icl.json")
    solved = own if own.is_file() else file.with_name("forget_qa_icl.json")
    if not solved.is_file():
        raise UserError(
            f"{shown(file)}: got no {own.name} beside it, expected MUSE's ten solved questions; "
            "copy the file there"
        )
    rows = [entry.row for entry in Draw().of(solved)]
    shots = "".join(
        f"Question: {row.text('question')}\nAnswer: {row.text('answer')}\n\n" for row in rows
    )
    entries = draw.of(file, f"knowmem/{file.stem}")
    for entry in entries:
        entry.scorable(muse.knowmem)
    return [(entry, shots) for entry in entries]


def _start(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The first tokens of a text, as many as the model writes."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[:VERBATIM_TOKENS]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _auc(forget: np.ndarray, holdout: np.ndarray) -> float:
    return muse.membership_auc(forget[:, 0], holdout[:, 0])


def _privleak(forget: np.ndarray, holdout: np.ndarray) -> float:
    """Of texts with the scores of the model and of the retrained one. Shape (N, 2) each."""
    retrained = muse.membership_auc(forget[:, 1], holdout[:, 1])
    return muse.privleak(_auc(forget, holdout), retrained)

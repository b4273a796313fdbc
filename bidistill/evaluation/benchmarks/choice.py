"""Multiple choice as WMDP and MMLU ask it: the letter that the model finds most probable.

A file is a set with one subject. A folder in MMLU's own layout, ``test/<subject>_test.csv`` and
``dev/<subject>_dev.csv``, is asked with the solved examples of ``dev``; any other file with none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from bidistill.data.items import Item as Read
from bidistill.data.sources.rows import shown
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks.entries import Draw, Entry, named_apart
from bidistill.evaluation.generation import prompt_sha256
from bidistill.evaluation.measures import Item, Meaning, Measure, mean_of
from bidistill.evaluation.metrics.choice import right_choice
from bidistill.evaluation.prompts import Prompt

HEAD = "The following are multiple choice questions (with answers) about {subject}.\n\n"
SUBJECTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
"""What WMDP's files are named for, and what its prompts call it."""

ACCURACY = Meaning(
    unit="share of items",
    ideal="chance if to be forgotten (0.25 of four); that of the model before if kept",
    good="ideal",
)


@dataclass(frozen=True, slots=True)
class Quiz:
    """One question with its prompt."""

    entry: Entry
    prompt: str
    choices: int
    right: tuple[int, ...]
    """Of options with the text of the right one, which files now and then repeat, all are right."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Quizzes of one or more files."""

    quizzes: tuple[Quiz, ...]

    name = "choice"

    @classmethod
    def read(cls, paths: Sequence[Path], draw: Draw) -> "Choice":
        """Read files of questions with options, or folders in MMLU's layout.

        Raises:
            UserError: a file cannot be read, or an entry has no options.
        """
        files = [pair for path in paths for pair in _files(path)]
        named_apart([file for file, _ in files])
        quizzes = []
        for file, solved in files:
            shots = "" if solved is None else _shots(solved)
            quizzes += [_quiz(entry, _subject(file), shots) for entry in draw.of(file)]
        return cls(tuple(quizzes))

    def ask(self, asker: Asker) -> list[Item]:
        """Score every letter as the continuation of its question."""
        spans = [
            Prompt(quiz.prompt, raw=True).span(asker.tokenizer, f" {letter}")
            for quiz in self.quizzes
            for letter in ascii_uppercase[: quiz.choices]
        ]
        scored = iter(zip(spans, asker.scores(spans, self.name), strict=True))
        items = []
        for quiz in self.quizzes:
            letters = [next(scored) for _ in range(quiz.choices)]
            log_probs = [sum(score.log_probs) for _, score in letters]
            accuracy = sum(right_choice(log_probs, right) for right in quiz.right)
            scores = {"accuracy": accuracy, "log_probs": log_probs}
            digest = prompt_sha256(letters[0][0].prompt_ids)
            items.append(quiz.entry.result(self.name, digest, None, scores))
        return items

    def measure(
        self, items: Sequence[Item], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        """Accuracy over all items, and of each file if there are several."""
        sets = dict.fromkeys(item["set"] for item in items)
        of_sets = {
            f"{name}/accuracy": mean_of(
                ACCURACY, [i for i in items if i["set"] == name], "accuracy"
            )
            for name in sets
        }
        return {"accuracy": mean_of(ACCURACY, items, "accuracy"), **of_sets}


def _quiz(entry: Entry, subject: str, shots: str) -> Quiz:
    item = _read(entry)
    about = item.label or item.subject or subject
    head = HEAD.format(subject=about.replace("_", " "))
    return Quiz(entry, head + shots + _question(item), len(item.choices), _right(item))


def _question(item: Read) -> str:
    options = zip(ascii_uppercase, item.choices, strict=False)
    lines = [str(item.question), *(f"{letter}. {text}" for letter, text in options), "Answer:"]
    return "\n".join(lines)


def _shots(path: Path) -> str:
    """All questions of a file with their answers."""
    items = [_read(entry) for entry in Draw().of(path)]
    return "".join(f"{_question(item)} {ascii_uppercase[_right(item)[0]]}\n\n" for item in items)


def _read(entry: Entry) -> Read:
    item = entry.item()
    if not item.choices or item.answer is None or len(item.choices) > len(ascii_uppercase):
        raise UserError(
            f"{item.source}: choices: got {len(item.choices)}, expected 2 to "
            f"{len(ascii_uppercase)} options and the right one; fill them in, or give the file as "
            "--data qa=FILE"
        )
    return item


def _right(item: Read) -> tuple[int, ...]:
    return tuple(at for at, choice in enumerate(item.choices) if choice == item.answer)


def _subject(path: Path) -> str:
    """What a file is about, by its name."""
    name = path.stem.removesuffix("_test").removesuffix("_val")
    words = name.replace("-", "_").split("_")
    known = [SUBJECTS[word] for word in words if word in SUBJECTS]
    return known[0] if known else " ".join(words)


def _files(path: Path) -> list[tuple[Path, Path | None]]:
    """Files of questions, each with that of its solved examples."""
    if not path.is_dir():
        return [(path, None)]
    tests = sorted((path / "test").glob("*_test.csv"))
    if not tests:
        raise UserError(
            f"{shown(path)}: got a folder without test/*_test.csv, expected MMLU's layout; name "
            "files, as in --data choice=FILE"
        )
    solved = [path / "dev" / f"{test.stem.removesuffix('_test')}_dev.csv" for test in tests]
    return [(t, s if s.is_file() else None) for t, s in zip(tests, solved, strict=True)]

"""Plain texts: how expected a model finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidistill.data.sources.rows import shown
from bidistill.data.sources.shapes import recognise
from bidistill.errors import UserError
from bidistill.evaluation.asking import Asker
from bidistill.evaluation.benchmarks.entries import Draw, Entry, named_apart
from bidistill.evaluation.benchmarks.qa import perplexity_of
from bidistill.evaluation.generation import prompt_sha256
from bidistill.evaluation.measures import Item, Meaning, Measure, mean_of
from bidistill.evaluation.metrics.memorisation import min_k_prob
from bidistill.evaluation.prompts import text_spans

WINDOW = 2048
"""Tokens of a text that are read together; what the model reads at most, if that is less."""
K = 0.4
"""Share of tokens of Min-K%, MUSE's."""

UNSEEN = "that of a model that never saw the texts, if they are to be forgotten"
MEANINGS = {
    "perplexity": Meaning(unit="equally likely tokens", ideal=UNSEEN, good="ideal"),
    "min_k": Meaning(unit="nats per token", ideal=UNSEEN, good="ideal"),
}


@dataclass(frozen=True, slots=True)
class Text:
    """Texts of one or more files, each file a set."""

    texts: tuple[tuple[Entry, str], ...]

    name = "text"

    @classmethod
    def read(cls, paths: Sequence[Path], draw: Draw) -> "Text":
        """Read documents; blank ones are left out.

        Raises:
            UserError: a file cannot be read, holds no document, or holds questions.
        """
        named_apart(paths)
        return cls(tuple(pair for path in paths for pair in documents(path, draw)))

    def ask(self, asker: Asker) -> list[Item]:
        """Score every token of every text."""
        scored = scores_of_texts([text for _, text in self.texts], asker, self.name)
        return [
            entry.result(self.name, digest, None, scores)
            for (entry, _), (digest, scores) in zip(self.texts, scored, strict=True)
        ]

    def measure(
        self, items: Sequence[Item], reference: Sequence[Item] | None
    ) -> dict[str, Measure]:
        """Perplexity over the tokens of a set, Min-K% over its texts."""
        measures = {}
        for name in dict.fromkeys(item["set"] for item in items):
            of_set = [item for item in items if item["set"] == name]
            measures[f"{name}/perplexity"] = perplexity_of(MEANINGS["perplexity"], of_set)
            measures[f"{name}/min_k"] = mean_of(MEANINGS["min_k"], of_set, "min_k")
        return measures


def documents(path: Path, draw: Draw, name: str | None = None) -> list[tuple[Entry, str]]:
    """Entries of a file with their texts; blank ones are left out.

    Raises:
        UserError: it cannot be read, holds no document, or holds questions.
    """
    found = []
    for entry in draw.of(path, name):
        item = recognise(entry.row).item(entry.row)
        if item is not None and item.text is None:
            raise UserError(
                f"{item.source}: text: got a question, expected a document; give the file as "
                "--data qa=FILE"
            )
        if item is not None and item.text:
            found.append((entry, item.text))
    if not found:
        raise UserError(
            f"{shown(path)}: got blank texts alone, expected a document; check the file"
        )
    return found


def scores_of_texts(
    texts: Sequence[str], asker: Asker, name: str
) -> list[tuple[str, dict[str, Any]]]:
    """Fingerprint and scores of texts: ``log_prob`` and ``tokens`` of all, and ``min_k``."""
    most = getattr(asker.model.config, "max_position_embeddings", None) or WINDOW
    spans = [text_spans(asker.tokenizer, text, min(WINDOW, most - 1)) for text in texts]
    scored = iter(asker.scores([span for of_text in spans for span in of_text], name))
    results = []
    for of_text in spans:
        log_probs = [p for _ in of_text for p in next(scored).log_probs]
        read = [token for span in of_text for token in (*span.prompt_ids, *span.answer_ids)]
        scores = {
            "log_prob": sum(log_probs),
            "tokens": len(log_probs),
            "min_k": min_k_prob(log_probs, K) if int(len(log_probs) * K) else None,
        }
        results.append((prompt_sha256(read), scores))
    return results

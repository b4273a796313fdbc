"""Items of a retrained model, written by the same command, to compare with."""

from collections.abc import Sequence
from pathlib import Path

from bidistill.data.jsonl import read_objects
from bidistill.errors import UserError
from bidistill.evaluation.measures import Item

HOW = (
    "train the base model on the retain set alone, run bidistill eval on it with the same --data, "
    "--limit and --seed, and give its items.jsonl with --reference"
)


def read_reference(path: Path) -> list[Item]:
    """Read the ``items.jsonl`` of an evaluation.

    Raises:
        UserError: the file cannot be read, or a line is no item of a benchmark.
    """
    items = []
    for number, item in read_objects(path):
        if not {"id", "benchmark"} <= item.keys():
            raise UserError(
                f"{path}:{number}: got an object without id and benchmark, expected an item of an "
                f"evaluation; {HOW}"
            )
        items.append(item)
    return items


def scores_of(
    reference: Sequence[Item], benchmark: str, score: str, ids: Sequence[str]
) -> list[float]:
    """A score of the items with these ids.

    Raises:
        UserError: an item or its score is missing.
    """
    found = {
        i["id"]: i.get("scores", {}).get(score) for i in reference if i["benchmark"] == benchmark
    }
    for id in ids:
        if found.get(id) is None:
            raise UserError(f"--reference: got no {score} of {id}, expected one; {HOW}")
    return [found[id] for id in ids]

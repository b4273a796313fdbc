"""A cell: one method trained with one seed. What it is to do is a file, and so is what came out.

.. code-block:: text

    cells/<method>/<seed>/
        cell.yaml        what is to be done: written first, and never changed
        recipe.yaml      how it trains, if it does
        run.json ...     of the training (see bidistill/train.py)
        gradients/       the angles between the roles' gradients, if they are asked for
        items.jsonl      replies to the probes, and under prefilling
        attacks.jsonl    replies under the other attacks
        metrics.json     rates and cost: written last, so a cell with it is done
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bidistill.compare.recipe import BASE, CompareConfig
from bidistill.errors import UserError
from bidistill.files import file_sha256, write_text
from bidistill.loading import file_checksums
from bidistill.settings import laid

CELL, RECIPE, METRICS = "cell.yaml", "recipe.yaml", "metrics.json"
ITEMS, ATTACKS = "items.jsonl", "attacks.jsonl"
RESULTS = {
    *("summary", "attacks", "gradients", "cost"),
    *("seconds", "peak_bytes", "versions", "commit", "threads"),
}
"""What `METRICS` holds."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A folder, and what is to be done there."""

    method: str
    seed: int | None
    """None where nothing is trained: asked twice, a model says the same."""
    folder: Path
    job: dict[str, Any]
    """What `CELL` holds."""

    @property
    def name(self) -> str:
        """For people."""
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        return (self.folder / METRICS).exists()

    def begin(self) -> None:
        """Write down what is to be done.

        Raises:
            UserError: as :meth:`check`.
        """
        self.check()
        path = self.folder / CELL
        if not path.exists():
            write_text(path, yaml.safe_dump(self.job, sort_keys=False, allow_unicode=True))

    def check(self) -> None:
        """Refuse a folder where something else was to be done.

        Raises:
            UserError: names what differs; or the file that says what was to be done is damaged.
        """
        path = self.folder / CELL
        if not path.exists():
            return
        way_out = "choose another output, or delete that folder to have it made again"
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{path}: got a damaged file, expected what its cell does; {way_out}")
        if changed := sorted(key for key in self.job if before.get(key) != self.job[key]):
            raise UserError(
                f"{self.folder}: got a cell with another {changed[0]}, expected the one of this "
                f"recipe; {way_out}"
            )

    def discard(self) -> None:
        """Delete what is large and can be made again: checkpoints of a run that ended."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def cells_of(config: CompareConfig, model: str, records: str | None, probes: Path) -> list[Cell]:
    """All cells, seed by seed, so that a comparison that is cut short has whole rows of a seed.

    Files are known by their checksums: with others in their place a cell is another one.

    Args:
        config: the comparison.
        model: folder of the model.
        records: file to train on that takes the place of `data.train`; None leaves it.
        probes: file of questions.

    Raises:
        UserError: there is no model, or no such file of records.
    """
    shared = {
        "model": model,
        "model_sha256": file_checksums(model),
        "probes": str(probes),
        "probes_sha256": file_sha256(probes),
        "attacks": list(config.attacks),
    }

    checksum = cache(_checksum)  # the same files for most cells

    def cell(method: str, seed: int | None, **job: Any) -> Cell:  # noqa: ANN401
        folder = config.output / "cells" / method / ("0" if seed is None else str(seed))
        nothing = {"train": None, "records_sha256": {}, "context": [], "gradients": None}
        given = {**shared, **nothing, **job}
        return Cell(method, seed, folder, given)

    def rows() -> Iterator[Cell]:
        yield cell(BASE, None)
        for seed in config.seeds:
            for name, method in config.methods.items():
                context = [dict(message) for message in method.context]
                if method.method is not None:
                    train = recipe_of(config, name, model, records)
                    train |= {"seed": seed}
                    yield cell(
                        name,
                        seed,
                        train=train,
                        records_sha256={path: checksum(path) for path in _files(train)},
                        context=context,
                        gradients=config.gradients if seed == config.seeds[0] else None,
                    )
                elif seed == config.seeds[0]:
                    yield cell(name, None, context=context)

    return list(rows())


def recipe_of(config: CompareConfig, name: str, model: str, records: str | None) -> dict[str, Any]:
    """How a method trains: what all share, under its own settings; without seed and output.

    Args:
        config: the comparison.
        name: of the method.
        model: as in :func:`cells_of`.
        records: as in :func:`cells_of`.
    """
    method = config.methods[name]
    recipe = laid(config.train, {"method": method.method, "model": {"path": model}})
    if records is not None:
        recipe = laid(recipe, {"data": {"train": records}})
    for key, value in method.settings.items():
        _put(recipe, key.split("."), value)
    return recipe


def _files(train: dict[str, Any]) -> list[str]:
    """The files that a recipe trains on."""
    given = train["data"]["train"]
    return given if isinstance(given, list) else [given]


def _checksum(path: str) -> str:
    """SHA-256 of a file of records."""
    try:
        return file_sha256(Path(path))
    except OSError as error:
        raise UserError(
            f"data.train: got '{error.strerror}' for {path}, expected a file of records; check the "
            "path"
        ) from None


def _put(recipe: dict[str, Any], path: Sequence[str], value: object) -> None:
    """Set a value within nested mappings; what stood there is replaced, as on a command line."""
    *outer, last = path
    for part in outer:
        inner = recipe.get(part)
        # a copy: methods share what all of them share
        recipe[part] = dict(inner) if isinstance(inner, dict) else {}
        recipe = recipe[part]
    recipe[last] = value

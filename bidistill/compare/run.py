"""A comparison from end to end. What is there already is not made again."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

from bidistill import prepare
from bidistill.compare import page
from bidistill.compare.cells import Cell, cells_of, recipe_of
from bidistill.compare.recipe import BASE, CompareConfig
from bidistill.compare.results import rows_of
from bidistill.config import load_config
from bidistill.errors import UserError
from bidistill.evaluation.attacks import check_names, require_forget
from bidistill.evaluation.probes import read_probes
from bidistill.files import write_text
from bidistill.pretrained import smollm2
from bidistill.progress import say

FAILED, INTERRUPTED = 1, 130
SHARED = "shared"
"""Folder of what all cells use."""
MADE_BY = "made_by.txt"
"""There: checksum of the sources that the demo's data were made by."""


class Inputs(NamedTuple):
    """What all cells of a comparison share."""

    model: str
    records: str | None
    """File to train on; None: the recipe names it."""
    probes: Path


def run(config: CompareConfig, *, table_only: bool = False) -> int:
    """Run the cells that are missing, one process each, then write table, plots and report.

    Args:
        config: the comparison.
        table_only: run nothing; report on what is there.

    Returns:
        0; 1 if a cell failed, after all others have run.

    Raises:
        UserError: the recipe cannot be used, a cell was begun by another recipe, or there is
            nothing to report on, as the model before is not measured.
        SystemExit: interrupted (code 130); what is done stays.
    """
    _check(config)
    inputs = _inputs(config, make=not table_only)
    cells = cells_of(config, *inputs)
    for cell in cells:
        cell.check() if table_only else cell.begin()
    missing = [] if table_only else [cell for cell in cells if not cell.done]
    say(f"{len(cells)} cells, {sum(cell.done for cell in cells)} done already")
    failed = _run(missing, config.jobs)
    rows = rows_of(config, cells)
    if rows and rows[0].name == BASE:
        say(page.write(config, rows, missing=[cell.name for cell in cells if not cell.done]))
    elif failed:
        say(f"no table: {BASE}, which all rows are compared with, is not done")
    else:
        raise _nothing(config)
    for cell in failed:
        say(f"FAILED  {cell.name}: see above; run the same command again to try it anew")
    return FAILED if failed else 0


def _nothing(config: CompareConfig) -> UserError:
    return UserError(
        f"{config.output}: got no result of {BASE}, expected what all rows are compared with; run "
        "without --table-only"
    )


def _inputs(config: CompareConfig, *, make: bool) -> Inputs:
    """The model, records and probes; those of the demo are made where they are missing."""
    if not config.demo:
        assert config.model, "load_compare checks"
        assert config.probes, "load_compare checks"
        return Inputs(config.model, None, config.probes)
    from bidistill.demo import prepare as demo
    from bidistill.loading import load_base, load_tokenizer

    folder, model = config.output / SHARED, smollm2()
    made_by = folder / MADE_BY
    if not (folder / demo.PROBES).exists():  # written after the records
        if not make:
            raise _nothing(config)
        write_text(made_by, demo.sources_sha256())
        demo.prepare(load_base(model), load_tokenizer(model), folder, seed=0)
    elif not made_by.exists() or made_by.read_text(encoding="utf-8") != demo.sources_sha256():
        raise UserError(
            f"{folder}: got the data of another version of the demo, expected this one's; choose "
            "another output, or delete this one"
        )
    return Inputs(str(model), str(folder / demo.RECORDS), folder / demo.PROBES)


def _check(config: CompareConfig) -> None:
    """Find what would end every cell, or the report, only after hours of training."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "compare: got no matplotlib, expected it for the plots; run pip install matplotlib"
        )
    check_names(config.attacks)
    if config.probes:
        probes = read_probes(config.probes)
        if config.attacks:
            require_forget(probes)
    _check_recipes(config)


def _check_recipes(config: CompareConfig) -> None:
    """Find a mistake in any method's settings before anything is made."""
    model, records = (config.model, None) if config.model else (str(smollm2()), "records")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        for name, method in config.methods.items():
            if method.method is None:
                continue
            recipe = recipe_of(config, name, model, records) | {"output": folder}
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            try:
                prepare.check(load_config(path))
            except UserError as error:
                raise UserError(f"methods.{name}: {error}") from None


def _run(cells: Sequence[Cell], jobs: int) -> list[Cell]:
    """Run cells; return those that failed."""
    start, stopped = time.monotonic(), threading.Event()

    def one(numbered: tuple[int, Cell]) -> int:
        number, cell = numbered
        if stopped.is_set():
            return INTERRUPTED
        minutes = (time.monotonic() - start) / 60
        say(f"[{number}/{len(cells)}, {minutes:.0f} min] {cell.name}")
        command = [sys.executable, "-m", "bidistill.compare.worker", str(cell.folder)]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            cell.discard()
        elif code in (INTERRUPTED, -signal.SIGINT):
            stopped.set()
        elif code < 0:  # nothing else says so: usually the system, short of memory
            say(f"{cell.name}: killed by signal {-code}")
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            codes = list(pool.map(one, enumerate(cells, start=1)))
        except KeyboardInterrupt:  # the cells at work got it, too, and end by themselves
            stopped.set()
    if stopped.is_set():
        say("interrupted; the same command goes on")
        raise SystemExit(INTERRUPTED)
    return [cell for cell, code in zip(cells, codes, strict=True) if code]

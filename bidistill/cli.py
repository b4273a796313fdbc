"""The ``bidistill`` command: one subcommand for each thing a person wants done.

Subcommands import what they need when they run, so that ``--help`` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

import bidistill
from bidistill.errors import UserError

INTERRUPTED = 130  # what shells use for a process ended by Ctrl-C
NOT_ENOUGH = 1  # a plan does not fit

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
ANY_PATH = click.Path(path_type=Path)
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(bidistill.__version__, prog_name="bidistill")
def cli() -> None:
    """Make a language model forget chosen facts, keep the rest, and prove both.

    \b
    First steps:
      bidistill demo                    a small real model forgets twelve capitals (about 5 minutes)
      bidistill unify recipe.yaml       corpora of your own become training records
      bidistill train recipe.yaml       the same for a model and data of your own

    Each command has its own help with an example: bidistill train --help
    """


@cli.command()
@OVERRIDES
@click.option("--output", type=FOLDER, default="runs/demo", show_default=True, help="Results.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo in the output folder.")
def demo(overrides: Sequence[str], output: Path, seed: int, resume: bool, overwrite: bool) -> None:
    """Make a small real model forget twelve capitals.

    The model is SmolLM2-135M-Instruct. Measures it before and after, and writes
    metrics.json and report.html. KEY=VALUE changes a setting of the demo's recipe.

    \b
    Examples:
      bidistill demo
      bidistill demo --output runs/all-layers model.adapter.contrast=null
    """
    from bidistill.demo import run

    run(output, overrides, seed=seed, resume=resume, overwrite=overwrite)


@cli.command()
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output folder.")
def train(recipe: Path, overrides: Sequence[str], resume: bool) -> None:
    """Train the model of RECIPE, a YAML file.

    KEY=VALUE changes a setting of the recipe; the key is dotted, the value is YAML.

    \b
    Example:
      bidistill train recipe.yaml optim.lr=1e-4 model.adapter.rank=8
    """
    from bidistill.config import load_config

    config = load_config(recipe, overrides)  # before the slow import: a typing error shows at once
    from bidistill.train import main

    main(config, resume=resume)


@cli.command()
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option(
    "--world", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of the run."
)
@click.option(
    "--gpu-mem",
    "memory_gib",
    type=click.FloatRange(min=0, min_open=True),
    required=True,
    help="Memory of the device of each rank, GiB.",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="What the run is planned for; it need not be here.",
)
@click.option("--json", "in_json", is_flag=True, help="Print JSON, bytes, instead of a table.")
def plan(
    recipe: Path,
    overrides: Sequence[str],
    world: int,
    memory_gib: float,
    device: str,
    in_json: bool,
) -> int:
    """Say what memory a run takes.

    Prints what each rank holds, before any weight is loaded, and chooses the largest parts of a
    step (parallel.accumulate) and the largest chunk of the losses (parallel.chunk_bytes) that fit.
    If nothing fits it says what else to change, and exits with code 1. Nothing but the
    config.json and the tokenizer of the model is read.

    \b
    Example:
      bidistill plan recipe.yaml --world 8 --gpu-mem 80
    """
    from bidistill.config import load_config

    config = load_config(recipe, overrides)
    from bidistill.plan import main

    fits = main(config, ranks=world, memory_gib=memory_gib, target=device, in_json=in_json)
    return 0 if fits else NOT_ENOUGH


@cli.command("eval")
@click.option("--model", type=FOLDER, required=True, help="Folder of the model.")
@click.option("--probes", type=FILE, help="JSON lines file of questions with their facts.")
@click.option(
    "--data",
    multiple=True,
    metavar="[KIND=]PATH",
    help="File or folder of a benchmark. KIND, where it is not plain from the fields: tofu, muse, "
    "choice, rwku, xstest, qa, text.",
)
@click.option("--out", type=FOLDER, required=True, help="Folder for the results.")
@click.option("--adapter", type=FOLDER, help="Folder of a LoRA adapter to put on the model.")
@click.option("--against", type=FOLDER, help="Folder of another model, to compare item by item.")
@click.option("--reference", type=FILE, help="items.jsonl of a retrained model, evaluated alike.")
@click.option(
    "--require",
    multiple=True,
    type=click.Choice(["forget_quality", "privleak"]),
    help="Stop at once if this cannot be measured.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use so many entries of each --data file."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of --limit."
)
def evaluate(
    model: Path,
    probes: Path | None,
    data: Sequence[str],
    out: Path,
    adapter: Path | None,
    against: Path | None,
    reference: Path | None,
    require: Sequence[str],
    limit: int | None,
    seed: int,
) -> None:
    """Measure what a model says, keeps and refuses.

    With --probes: the share of forgotten facts, neighbours and general knowledge, refusals where
    none is wanted, and what a given start of the answer still brings out. With --data: the metrics
    of published benchmarks, from local files. Writes metrics.json and items.jsonl. Started by
    torchrun, all ranks share the work.

    \b
    Examples:
      bidistill eval --model path/to/model --probes probes.jsonl --out runs/eval
      bidistill eval --model path/to/model --data facts.csv --data xstest.csv --out runs/eval
      bidistill eval --model forgot --against before --data forget10_perturbed.json --out runs/tofu
    """
    from bidistill.evaluation import run

    run(
        model,
        adapter,
        probes,
        out,
        data=data,
        against=against,
        reference=reference,
        require=require,
        limit=limit,
        seed=seed,
    )


@cli.command()
@click.option("--model", type=FOLDER, required=True, help="Folder of the model.")
@click.option("--probes", type=FILE, required=True, help="JSON lines file of questions.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the results.")
@click.option("--adapter", type=FOLDER, help="Folder of a LoRA adapter, merged in first.")
@click.option("--attack", "names", multiple=True, metavar="NAME", help="One of them; else all.")
@click.option("--against", type=FOLDER, help="Folder of a model to compare with.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def attack(
    model: Path,
    probes: Path,
    out: Path,
    adapter: Path | None,
    names: Sequence[str],
    against: Path | None,
    seed: int,
) -> None:
    """Attack what a model was made to forget.

    Asks for the facts of the probes of group forget in many ways, trains and quantises a copy in
    memory, and looks into the layers. Writes metrics.json, items.jsonl and a table. With --against,
    which may name the model before it forgot, both stand side by side.

    \b
    Examples:
      bidistill attack --model path/to/model --probes probes.jsonl --out runs/attack
      bidistill attack --model runs/demo/model --probes runs/demo/data/probes.jsonl \\
        --out runs/attack --against path/to/base --attack prefill --attack relearn
    """
    from bidistill.evaluation.attacks.run import run

    run(model, probes, out, adapter=adapter, names=names, against=against, seed=seed)


@cli.command("teacher-check")
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option("--probes", type=FILE, help="Questions with their facts, to see what still leaks.")
def teacher_check(recipe: Path, overrides: Sequence[str], probes: Path | None) -> None:
    """Check before training that the teacher refuses.

    Shows, for each role, how often the teacher refuses and, given --probes, says the fact.

    \b
    Example:
      bidistill teacher-check recipe.yaml
    """
    from bidistill.config import load_config

    config = load_config(recipe, overrides)
    from bidistill.teacher.check import check_main

    check_main(config, probes=probes)


@cli.command("teacher-cache")
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option("--check", is_flag=True, help="Only compare what is there with its checksums.")
def teacher_cache(recipe: Path, overrides: Sequence[str], check: bool) -> None:
    """Run the teacher once and keep its rows on disk.

    bidistill train reads them where the recipe has teacher.cache: disk. With teacher.cache: topk
    the best ids of each row are kept instead. What is there stays unless it is damaged. KEY=VALUE
    changes a setting of the recipe.

    \b
    Examples:
      bidistill teacher-cache recipe.yaml
      bidistill teacher-cache recipe.yaml teacher.cache=topk teacher.topk=32
      bidistill teacher-cache recipe.yaml --check
    """
    from bidistill.config import load_config

    config = load_config(recipe, overrides)
    from bidistill.teacher.cache import main

    main(config, check=check)


@cli.command()
@click.argument("recipe", type=FILE, required=False)
@OVERRIDES
@click.option(
    "--format", "formats", multiple=True, metavar="[SOURCE=]FORMAT", help="Shape of the entries."
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier result that nobody changed.")
@click.option("--check", "folder", type=FOLDER, help="Compare a result with its manifest instead.")
def unify(
    recipe: Path | None,
    overrides: Sequence[str],
    formats: Sequence[str],
    overwrite: bool,
    folder: Path | None,
) -> None:
    """Turn any corpora into training records.

    RECIPE, a YAML file, names the sources and what is done with them. The output folder gets
    train.jsonl, held_out.jsonl, gold.jsonl and a manifest of what they were made of; the same
    recipe and files give the same bytes. KEY=VALUE changes a setting of the recipe.

    \b
    Examples:
      bidistill unify recipes/tofu.yaml
      bidistill unify recipes/tofu.yaml root=path/to/data split.held_out=0.2 prefills.per_item=0
      bidistill unify --check data/tofu
    """
    if folder is not None:
        if recipe is not None or overwrite or formats:
            raise click.UsageError("--check goes with no recipe and no other option.")
        from bidistill.data.unify.manifest import verify

        for line in verify(folder):
            click.echo(line)
        return
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE'.")
    from bidistill.data.unify.recipe import load_recipe

    settings = load_recipe(recipe, overrides, formats)
    from bidistill.data.unify.run import run
    from bidistill.data.unify.summary import summary

    click.echo(summary(run(settings, overwrite=overwrite), settings.output))


@cli.command()
@click.option("--data", type=ANY_PATH, required=True, help="Folder of unify, or a file of records.")
@click.option("--model", type=FOLDER, help="Folder of a model, to measure gaps between roles.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the report.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Items of each role that the model reads, at most.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def diagnose(data: Path, model: Path | None, out: Path, samples: int, seed: int) -> None:
    """Report what the roles' texts are like.

    Counts lengths and words of each role. With --model it also measures how far apart the model
    sees the roles, before and after unification. Writes diagnose.md, diagnose.json and a picture.

    \b
    Example:
      bidistill diagnose --data data/tofu --model path/to/model --out runs/diagnose
    """
    from bidistill.diagnose import run

    run(data, model, out, samples=samples, seed=seed)
    click.echo(out / "diagnose.md")


@cli.command()
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option("--out", type=FOLDER, required=True, help="Folder for the report.")
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Steps of training between two measurements.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Stop after so many of the recipe's.")
def gradients(
    recipe: Path, overrides: Sequence[str], out: Path, every: int, steps: int | None
) -> None:
    """Measure whether the roles' gradients agree.

    Trains by RECIPE, keeping nothing of it, and looks at each pair of roles now and then: the
    cosine of their gradients, and what a small step for the one does to the loss of the other.
    Writes gradients.md, gradients.json and a picture. KEY=VALUE changes a setting of the recipe.

    \b
    Example:
      bidistill gradients recipe.yaml --out runs/gradients --every 5
    """
    from bidistill.config import load_config

    config = load_config(recipe, overrides)
    from bidistill.diagnose.gradients import run

    run(config, out, every=every, steps=steps)


@cli.command()
@click.argument("recipe", type=FILE)
@OVERRIDES
@click.option("--table-only", is_flag=True, help="Run nothing; report on the cells that are done.")
def compare(recipe: Path, overrides: Sequence[str], table_only: bool) -> int:
    """Compare methods: what each forgets and keeps.

    RECIPE, a YAML file, names the methods, the seeds and what they share. Each method and seed is
    a cell: a process of its own that trains, asks and attacks. What is done is not done again, so
    the same command goes on after an interruption. Writes compare.html, compare.md and
    compare.json. KEY=VALUE changes a setting of the recipe.

    \b
    Example:
      bidistill compare recipes/demo-compare.yaml
    """
    from bidistill.compare.recipe import load_compare

    config = load_compare(recipe, overrides)
    from bidistill.compare import run

    return run(config, table_only=table_only)


@cli.command()
@click.argument("run_dir", type=FOLDER)
def report(run_dir: Path) -> None:
    """Write the report of a run.

    Makes report.html and report.md from the measurements in RUN_DIR.

    \b
    Example:
      bidistill report runs/demo
    """
    from bidistill.evaluation.report import render

    render(run_dir)


@cli.command()
def info() -> None:
    """Show versions and back-ends, or why one is absent.

    \b
    Example:
      bidistill info
    """
    from bidistill.about import describe

    click.echo(describe())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after ``bidistill``; those of the process if None.

    Returns:
        Exit code: 0, 1 if a plan does not fit, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        # not standalone: click would exit by itself, with messages of another form than ours
        code = cli.main(arguments or ["--help"], prog_name="bidistill", standalone_mode=False)
    except UserError as error:
        return _complain(str(error))
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "bidistill"
        return _complain(f"{error.format_message()} See {command} --help.")
    except click.Abort:  # what click makes of Ctrl-C
        click.echo("interrupted", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    click.echo(f"error: {message}", err=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())

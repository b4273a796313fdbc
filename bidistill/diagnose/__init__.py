"""The domain report: what each role's texts are like, and how far apart a model sees the roles.

.. code-block:: text

    unify's folder --corpus--> texts and samples of each role --measure--> hidden states by form
                      |                                          |
                  statistics                                    gap --> report, plot

Heavy modules are imported where they are used: without a model none of them is needed.
"""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidistill.errors import UserError

if TYPE_CHECKING:
    from bidistill.diagnose.corpus import Corpus
    from bidistill.diagnose.gap import Comparison
    from bidistill.diagnose.measure import States

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
"""What measuring a gap needs beside the dependencies: modules, and where they come from."""
PLOT = "diagnose.svg"


def run(
    data: Path | str,
    model_dir: Path | str | None,
    out_dir: Path | str,
    *,
    samples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Write ``diagnose.json`` and ``diagnose.md``, and with a model ``diagnose.svg``.

    Args:
        data: a folder that ``bidistill unify`` made, or a JSON lines file of records, which has
            nothing to compare with.
        model_dir: folder of a model with a chat template. None: texts alone.
        out_dir: folder for the files; created if missing.
        samples: items of each role to run through the model, at most.
        seed: of the sample and of everything drawn from it.

    Returns:
        What ``diagnose.json`` holds.

    Raises:
        UserError: data or model cannot be read, or a package is missing.
    """
    from bidistill.diagnose.corpus import read_corpus
    from bidistill.diagnose.report import verdict

    states: States = {}
    comparisons: dict[str, Comparison] = {}
    if model_dir is None:
        corpus = read_corpus(Path(data), samples, seed)
    else:
        _require_packages()
        from bidistill.diagnose.measure import gaps, hidden_states
        from bidistill.loading import load_tokenizer

        tokenizer = load_tokenizer(model_dir)
        # plain text: no start token, which every text would count alike
        count = lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
        corpus = read_corpus(Path(data), samples, seed, count)
        states = hidden_states(model_dir, tokenizer, corpus)
        comparisons = gaps(states, seed)
    result = {
        "data": str(data),
        "model": None if model_dir is None else str(model_dir),
        "samples": samples,
        "seed": seed,
        "verdict": None if model_dir is None else verdict(comparisons),
        "remarks": corpus.remarks,
        "sampled": {f: {role: len(rows) for role, rows in r.items()} for f, r in states.items()},
        "gaps": {pair: _plain(comparison) for pair, comparison in comparisons.items()},
        "text": _text(corpus),
    }
    _write(Path(out_dir), result, states, comparisons)
    return result


def _require_packages() -> None:
    """Refuse before anything slow begins."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UserError(
            f"diagnose --model: got no {' and no '.join(missing)}, expected them installed; run "
            f"pip install {' '.join(missing)}, or leave out --model"
        )


def _text(corpus: "Corpus") -> dict[str, dict[str, Any]]:
    """Statistics of texts by form and role; raw ones where files have them."""
    forget = corpus.roles.get("forget")
    sides: dict[str, dict[str, Any]] = {}
    for role, texts in corpus.roles.items():
        if texts.before.texts:
            known = forget.before if forget and forget.before.texts else None
            sides.setdefault("before", {})[role] = texts.before.summary(known)
    sides["after"] = {
        role: texts.after.summary(forget.after if forget else None)
        for role, texts in corpus.roles.items()
    }
    return sides


def _plain(comparison: "Comparison") -> dict[str, Any]:
    """A comparison in plain types, ready for JSON."""
    return {
        "forms": {form: asdict(gap) for form, gap in comparison.gaps.items()},
        "changes": {
            f"{old} to {new}": {k: asdict(v) | {"direction": v.direction} for k, v in each.items()}
            for (old, new), each in comparison.changes.items()
        },
    }


def _write(
    out_dir: Path,
    result: dict[str, Any],
    states: "States",
    comparisons: "dict[str, Comparison]",
) -> None:
    """Each file as a whole or not at all, and the verdict to standard output."""
    from bidistill.diagnose.report import markdown
    from bidistill.files import write_json, write_text
    from bidistill.progress import say

    if comparisons:
        from bidistill.diagnose.plot import draw

        draw(out_dir / PLOT, states, comparisons)
    write_json(out_dir / "diagnose.json", result)
    write_text(out_dir / "diagnose.md", markdown(result, comparisons, PLOT))
    for remark in result["remarks"]:
        say(remark)
    if result["verdict"]:
        say(result["verdict"]["sentence"])
    say(f"report: {out_dir / 'diagnose.md'}")

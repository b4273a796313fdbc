"""The command line: mistakes become one line and exit code 2, help answers at once."""

import re
import subprocess
import sys
from importlib import import_module

import pytest

import bidistill
import bidistill_kernels
from bidistill import about
from bidistill.cli import cli, main
from bidistill.errors import UserError

RECIPE = """
model: {path: missing}
data: {train: train.jsonl, per_step: {retain: 1}}
objectives: {retain: {loss: jsd}}
steps: 1
output: run
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bidistill, version {bidistill.__version__}\n"


def test_no_arguments_show_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("Usage: bidistill")


@pytest.mark.parametrize("command", list(cli.commands))
def test_help_has_an_example_and_describes_itself(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(f"Examples?:\n    bidistill {command}", text)
    main(["--help"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(f"  {command} "))
    assert not line.endswith("..."), "the first line of the help is too long to be shown"


def test_help_does_not_wait_for_pytorch():
    code = "import sys, bidistill.cli; bidistill.cli.main(['train', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bidistill.cli" in done.stdout.split()
    assert not {"torch", "transformers", "pydantic"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'. See bidistill --help."),
        (["train"], "Missing argument 'RECIPE'. See bidistill train --help."),
        (["train", "none.yaml"], "none.yaml: cannot be read: .*; give a recipe file"),
        (["train", "--fast", "x"], "No such option '--fast'. See bidistill train --help."),
        (["demo", "--seed", "-1"], "Invalid value for '--seed': .* See bidistill demo --help."),
        (["eval", "--model", "x"], "Missing option '--probes'. See bidistill eval --help."),
        (["attack", "--model", "x"], "Missing option '--probes'. See bidistill attack --help."),
        (["report", "no-such-run"], "no-such-run.*"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_line_and_exit_2(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {message}\n", err)


@pytest.mark.parametrize("command", ["train", "teacher-check", "teacher-cache"])
def test_unknown_setting(capsys, recipe, command):
    assert main([command, recipe, "optim.lrr=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: optim: got unknown key 'lrr'")
    assert err.endswith("did you mean 'lr'?\n")
    assert err.count("\n") == 1


def raise_error(error):
    def run(*args, **kwargs):
        raise error

    return run


def test_user_error_of_a_command(capsys, monkeypatch, recipe):
    error = UserError("model: got no folder, expected one; download it")
    monkeypatch.setattr("bidistill.train.main", raise_error(error))
    assert main(["train", recipe]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_interrupt(capsys, monkeypatch, recipe):
    monkeypatch.setattr("bidistill.train.main", raise_error(KeyboardInterrupt()))
    assert main(["train", recipe]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_own_mistakes_keep_their_traceback(monkeypatch, recipe):
    monkeypatch.setattr("bidistill.train.main", raise_error(ValueError("a defect")))
    with pytest.raises(ValueError, match="a defect"):
        main(["train", recipe])


def test_train_passes_recipe_and_resume_on(monkeypatch, recipe):
    calls = []
    monkeypatch.setattr("bidistill.train.main", lambda *a, **k: calls.append((a, k)))
    assert main(["train", recipe, "steps=9", "optim.lr=1e-4", "--resume"]) == 0
    ((config,), keywords) = calls[0]
    assert (config.steps, config.optim.lr, keywords) == (9, 1e-4, {"resume": True})


def test_info_names_version_and_every_back_end(capsys):
    assert main(["info"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["bidistill"] == bidistill.__version__
    assert shown["native"].startswith(("version ", "absent: ", "broken: "))
    assert set(about.LIBRARIES) <= set(shown)


def test_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(about, "__file__", str(tmp_path / "bidistill" / "about.py"))
    assert about.commit() == "unknown"

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)

    git("init")
    assert about.commit() == "unknown"
    git("commit", "--allow-empty", "-m", "first")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert about.commit() == head
    (tmp_path / "edited").write_text("")
    assert about.commit() == f"{head}+"


@pytest.mark.parametrize("name", bidistill.__all__)
def test_public_names_exist(name):
    home = {"info": "bidistill.about", "UserError": "bidistill.errors"}
    expected = getattr(import_module(home.get(name, "bidistill_kernels")), name)
    assert getattr(bidistill, name) is expected


def test_every_public_name_of_the_kernels_is_here():
    assert set(bidistill_kernels.__all__) <= set(bidistill.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'linear_bidirectional_lk'"):
        bidistill.linear_bidirectional_lk  # noqa: B018  # pyright: ignore

"""From files to files: the command on a tiny random model, alone and beside another."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bidistill.cli import main
from bidistill.evaluation.attacks import NAMES, attack
from bidistill.evaluation.probes import write_probes
from bidistill.loading import load_base
from tests.evaluation.attacks.invented import FORGET, PROBES


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_probes(tmp_path / "probes.jsonl", PROBES)
    return tmp_path


def command(folder, *more):
    return main(
        [
            "attack",
            *("--model", str(folder / "model")),
            *("--probes", str(folder / "probes.jsonl")),
            *("--out", str(folder / "out")),
            *more,
        ]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_what_attack_says(folder, tokenizer, capsys):
    assert command(folder) == 0
    summary, items = attack(load_base(folder / "model"), tokenizer, PROBES)
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["summary"] == json.loads(json.dumps(summary))
    assert list(summary["attacks"]) == list(NAMES)
    assert lines(folder / "out" / "items.jsonl") == items
    assert metrics["against"] is None
    assert len(metrics["probes_sha256"]) == 64
    printed = capsys.readouterr().out
    assert printed == (folder / "out" / "attacks.md").read_text()
    rows = printed.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:-1]] == list(NAMES)
    assert len({len(row) for row in rows}) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_the_adapter_is_used_and_both_models_stand_side_by_side(folder, model, capsys):
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    names = ("--attack", "plain", "--attack", "reverse")
    more = ("--adapter", str(folder / "adapter"), "--against", str(folder / "model"))
    assert command(folder, *names, *more) == 0
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert list(metrics["summary"]["attacks"]) == list(metrics["against"]["attacks"])
    changed, base = (lines(folder / "out" / f"items{name}.jsonl") for name in ("", "_against"))
    assert [i["prompt_sha256"] for i in changed] == [i["prompt_sha256"] for i in base]
    assert [i["continuation"] for i in changed] != [i["continuation"] for i in base]
    assert len(base) == len(FORGET) * 5
    assert "| leak before" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_shows_before_the_model_loads(folder, capsys):
    out = ("--out", str(folder / "probes.jsonl" / "out"), "--model", "none")
    assert command(folder, *out) == 2
    assert re.fullmatch(
        r"error: \S+: cannot be written \(\S+probes\.jsonl is no folder\); choose another folder\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--attack", "revers"), "attack: got 'revers'.*did you mean 'reverse'"),
        (("--adapter", "none"), "adapter: got none, expected a folder"),
        (("--against", "none"), "model.path: got none, expected a folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, more, message):
    assert command(folder, "--attack", "plain", *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (folder / "out").exists()

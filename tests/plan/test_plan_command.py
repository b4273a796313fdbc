"""The command: a table, JSON, exit codes, and one line for what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import LlamaConfig, Qwen3MoeConfig, T5Config

from bidistill.cli import main
from bidistill.config import as_dict
from bidistill.plan.tracker import KINDS
from tests.plan.measured import SIZES, Case, config_of, planner, write_config


@pytest.fixture
def recipe(folder, tmp_path):
    config = config_of(Case("lora"), folder)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_dict(config)), encoding="utf-8")
    return path


def run(recipe, *words, memory="1", device="cpu"):
    return main(["plan", str(recipe), "--gpu-mem", memory, "--device", device, *words])


def test_table(recipe, folder, capsys):
    assert run(recipe) == 0
    said = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in said.splitlines()}
    for kind in "parameters", "gradients", "optimiser", "activations", "loss buffers", "teacher":
        assert kind in rows
    config = config_of(Case("lora"), folder)
    total = planner(config).plan(config).memory.total
    assert float(rows["peak"][1]) == pytest.approx(total / 2**30, abs=1e-3)
    assert "take parallel.accumulate=1" in said
    assert "0.950 that may be used" in said


def test_json_of_a_gpu_run_on_eight_ranks(recipe, capsys):
    assert run(recipe, "--world", "8", "--json", "parallel.recompute=true", device="cuda") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert not plan["changes"]
    assert set(plan["chosen"]["at_peak"]) == set(KINDS)
    assert sum(plan["chosen"]["at_peak"].values()) == plan["chosen"]["peak_bytes"]
    assert not torch.distributed.is_initialized()


def test_nothing_fits(recipe, capsys):
    assert run(recipe, memory="0.001") == 1
    said = capsys.readouterr()
    assert "nothing fits, not even parallel.accumulate=8" in said.out
    assert "parallel.recompute=true: " in said.out
    assert "does not fit" in said.out
    assert "plan changes: " in said.err


def test_no_weight_is_read(recipe, folder, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "untied").iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    assert run(recipe, f"model.path={model}") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.path=/nowhere"], "model.path: got /nowhere, expected a folder"),
        (["data.train=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--world", "9"], "per_step: got 8 examples for 9 ranks"),
        (["--world", "3", "parallel.shard=2"], "parallel.shard: got 2 with 3 ranks"),
        (["--world", "0"], "--world"),
        (["model.adapter=null", "teacher.cache=off"], "teacher.cache: got off"),
        (["model.adapter.targets=[nothing]"], "model.adapter.targets: got 'nothing'"),
        (["parallel.chunk_bytes=0"], "parallel.chunk_bytes"),
        (["parallel.chunks=1"], "did you mean 'chunk_bytes'?"),
        (
            ["teacher.kind=frozen", "teacher.path=/nowhere"],
            "teacher.path: got /nowhere, expected a folder",
        ),
        (["--device", "cuda", "model.attention=flash"], "flash with model.dtype float32"),
    ],
)
def test_mistakes_are_one_line(recipe, words, said, capsys):
    assert run(recipe, *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.parametrize("memory", ["0", "-1", "much", "nan", "inf"])
def test_memory_must_be_positive(recipe, memory, capsys):
    assert run(recipe, memory=memory) == 2
    assert "--gpu-mem" in capsys.readouterr().err


def test_a_config_of_no_model(recipe, folder, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "untied").iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "unheard_of"}))
    assert run(recipe, f"model.path={model}") == 2
    error = capsys.readouterr().err
    assert "model.path" in error


@pytest.mark.parametrize("cache", ["off", "memory", "topk"])
def test_a_teacher_whose_head_is_padded(recipe, folder, cache, capsys):
    """As the trainer does, both heads are cut to the smaller one."""
    write_config(folder / "padded", LlamaConfig(**{**SIZES, "vocab_size": 4096}))
    words = ["teacher.kind=frozen", f"teacher.path={folder / 'padded'}", f"teacher.cache={cache}"]
    loss = "topk_kl" if cache == "topk" else "bidirectional_kl"
    words += [f"objectives.{role}.loss={loss}" for role in ("forget", "neighbor")]
    assert run(recipe, *words) == 0
    assert "take parallel.accumulate=1" in capsys.readouterr().out


def test_a_teacher_whose_tokens_are_others(recipe, folder, tmp_path, capsys):
    write_config(tmp_path / "other", LlamaConfig(**SIZES))
    tokenizer = tmp_path / "other" / "tokenizer.json"
    settings = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(settings), encoding="utf-8")
    assert run(recipe, "teacher.kind=frozen", f"teacher.path={tmp_path / 'other'}") == 2
    assert "teacher.path: got" in capsys.readouterr().err


def test_a_teacher_that_is_no_causal_model_is_named(recipe, tmp_path, capsys):
    write_config(tmp_path / "other", T5Config(vocab_size=4000))
    assert run(recipe, "teacher.kind=frozen", f"teacher.path={tmp_path / 'other'}") == 2
    assert f"error: teacher.path: {tmp_path / 'other'} cannot be loaded" in capsys.readouterr().err


def test_sizes_that_no_plan_knows(recipe, tmp_path, capsys):
    """Experts one by one, as a config may ask for: how many tokens each gets is not known."""
    experts = {"num_experts": 4, "experts_implementation": "eager"}
    write_config(tmp_path / "model", Qwen3MoeConfig(**SIZES))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **experts}), "utf-8")
    assert run(recipe, f"model.path={tmp_path / 'model'}", "model.adapter=null") == 2
    assert "it cannot be planned" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["model.attention=flash"], ["model.liger=true"]])
def test_what_takes_a_gpu_is_planned_without_one(recipe, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(recipe, "model.dtype=bfloat16", *words, "--json", device="cuda") == 0
    plan = capsys.readouterr().out
    assert run(recipe, "model.dtype=bfloat16", "--json", device="cuda") == 0
    assert plan == capsys.readouterr().out
    assert run(recipe, "model.dtype=bfloat16", *words, device="cpu") == 2


def test_not_under_torchrun(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(recipe) == 2
    assert "leave torchrun out" in capsys.readouterr().err


def test_a_plan_leaves_nothing_behind(folder):
    """A real step after it has no masks, patches or ranks of the plan."""
    from bidistill import attention, models
    from bidistill_kernels import _loss, _ops

    before = _ops.scaled, _loss.settings, _loss.as_autocast, models.base_rows
    config = replace(config_of(Case("lora"), folder), steps=1)
    planner(config, 2).plan(config)
    assert before == (_ops.scaled, _loss.settings, _loss.as_autocast, models.base_rows)
    assert attention._square_mask.cache_info().currsize == 0
    assert not torch.distributed.is_initialized()

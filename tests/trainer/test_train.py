"""Whole runs on a tiny model: they learn, they resume to the bit, they refuse what is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bidistill import checkpoint, train
from bidistill.config import ObjectiveConfig, OptimConfig, TeacherConfig, as_dict
from bidistill.errors import UserError
from bidistill.teacher.compute import HiddenCache
from bidistill.update import learning_rate

WEIGHTS = {"adapter": "adapter_model.safetensors", "model": "model.safetensors"}


def in_folder(config, folder):
    return replace(config, output=folder)


def full(config):
    """The same recipe for all weights."""
    optim = OptimConfig(lr=1e-3, warmup_steps=1)
    return replace(config, model=replace(config.model, adapter=None), optim=optim)


def weights_of(result):
    return (result / WEIGHTS[result.name]).read_bytes()


def log_of(config):
    text = (config.output / "train_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@contextmanager
def dying_at(step, how):
    """Let ``how`` happen in the middle of a step, counted from 0."""
    original = train.train_step

    def dying(*arguments):
        if arguments[6] == step:
            how()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", dying)
        yield


class Power(Exception):
    """The plug was pulled."""


def pull_the_plug():
    raise Power


@pytest.mark.parametrize("mode", ["lora", "full", "lora, bf16", "full, bf16"])
def test_learns_and_logs(config, mode):
    config = replace(full(config) if mode.startswith("full") else config, steps=12)
    if mode.endswith("bf16"):
        config = replace(config, model=replace(config.model, dtype="bfloat16"))
    result = train.main(config)
    log = log_of(config)
    assert [entry["step"] for entry in log] == list(range(1, 13))
    for role in ("forget", "neighbor", "retain", "adversarial"):
        assert all(entry[f"loss/{role}"] >= 0 for entry in log)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert all(e["grad_norm"] > 0 and e["tokens"] > e["rows"] > 0 for e in log)
    assert all(t.dtype == torch.float32 for t in load_file(result / WEIGHTS[result.name]).values())
    run = json.loads((config.output / "run.json").read_text())
    assert run["config"] == as_dict(config)
    assert run["versions"]["torch"] == torch.__version__
    assert "commit" in run


def test_cached_and_live_teacher_train_alike(config, tmp_path):
    live = replace(config, teacher=replace(config.teacher, cache="off"), output=tmp_path / "live")
    results = [load_file(train.main(c) / WEIGHTS["adapter"]) for c in (config, live)]
    for name, cached in results[0].items():
        torch.testing.assert_close(results[1][name], cached, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
@pytest.mark.parametrize("step", [1, 4, 5])
def test_resumes_after_a_crash_bit_for_bit(config, tmp_path, make, step):
    config = make(config)
    whole = train.main(in_folder(config, tmp_path / "whole"))
    with dying_at(step, pull_the_plug), pytest.raises(Power):
        train.main(config)
    resumed = train.main(config, resume=True)
    assert weights_of(resumed) == weights_of(whole)
    timeless = [
        [{k: v for k, v in entry.items() if k != "step_ms"} for entry in log_of(c)]
        for c in (config, in_folder(config, tmp_path / "whole"))
    ]
    assert timeless[0] == timeless[1]


def test_resumes_after_sigkill_bit_for_bit(config, tmp_path):
    config = replace(config, steps=60, checkpoint_every=5, threads=1)
    whole = train.main(in_folder(config, tmp_path / "whole"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(as_dict(config)))  # JSON is YAML
    command = [sys.executable, "-m", "bidistill.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log = config.output / "train_log.jsonl"
    kill_after = random.Random().randint(1, 15)  # any step must do
    while not log.exists() or len(log.read_bytes().splitlines()) < kill_after:
        assert process.poll() is None, "ended by itself"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (config.output / "adapter").exists(), "it was killed too late to prove anything"
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert weights_of(config.output / "adapter") == weights_of(whole)
    assert len(log_of(config)) == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_step_and_keeps_a_checkpoint(config, tmp_path, number):
    whole = train.main(in_folder(config, tmp_path / "whole"))
    before = signal.getsignal(number)
    with dying_at(2, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as exit_:
        train.main(config)
    assert exit_.value.code == 130
    assert signal.getsignal(number) is before
    latest = checkpoint.latest(config.output / "checkpoints")
    assert latest is not None
    assert latest.name == "step-000003"
    assert len(log_of(config)) == 3
    assert not (config.output / "adapter").exists()
    assert weights_of(train.main(config, resume=True)) == weights_of(whole)


def test_resume_of_a_finished_run_does_nothing(config, capsys):
    result = train.main(config)
    before = result.stat().st_mtime_ns
    assert train.main(config, resume=True) == result
    assert result.stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().out


def test_another_run_is_not_overwritten(config):
    train.main(config)
    with pytest.raises(UserError, match=r"output: got .*holds a run.*--resume.*another output"):
        train.main(config)


def test_resume_with_another_recipe_names_the_key(config):
    with dying_at(3, pull_the_plug), pytest.raises(Power):
        train.main(config)
    changed = replace(config, optim=replace(config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"^optim.lr: got 0.5, expected 0.01 as this run began"):
        train.main(changed, resume=True)
    with pytest.raises(UserError, match=r"^model.adapter: got null"):
        train.main(full(config), resume=True)


def test_what_does_not_change_the_result_may_change_on_resume(config, tmp_path):
    whole = train.main(in_folder(config, tmp_path / "whole"))
    with dying_at(3, pull_the_plug), pytest.raises(Power):
        train.main(config)
    changed = replace(config, async_checkpoints=True, keep_checkpoints=1, checkpoint_every=1)
    changed = replace(changed, data=replace(config.data, workers=1, cache=tmp_path / "elsewhere"))
    changed = replace(changed, teacher=replace(config.teacher, cache_folder=tmp_path / "rows"))
    assert weights_of(train.main(changed, resume=True)) == weights_of(whole)


def test_other_weights_of_the_model_are_refused_on_resume(config, model_dir, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    config = replace(config, model=replace(config.model, path=str(path)))
    with dying_at(3, pull_the_plug), pytest.raises(Power):
        train.main(config)
    weights = load_file(path / "model.safetensors")
    save_file(
        {n: 1.01 * t for n, t in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"^model\.path: got another model\.safetensors, expected"):
        train.main(config, resume=True)


def test_a_run_without_a_teacher_keeps_none(config):
    alone = dict.fromkeys(config.objectives, ObjectiveConfig(loss="cross_entropy"))
    config = replace(full(config), objectives=alone)
    config = replace(config, steps=2, teacher=replace(config.teacher, cache="off"))
    assert train.main(config).exists()


def test_a_damaged_record_of_a_run_is_named(config):
    with dying_at(3, pull_the_plug), pytest.raises(Power):
        train.main(config)
    path = config.output / "run.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=r"run\.json: got a damaged file, expected what this run"):
        train.main(config, resume=True)


def test_nothing_to_resume_from_is_said(config, capsys):
    train.main(config, resume=True)
    assert "no checkpoint to resume from; training from the first step" in capsys.readouterr().out


def test_changed_data_is_refused_on_resume(config):
    with dying_at(3, pull_the_plug), pytest.raises(Power):
        train.main(config)
    data = config.data.train
    data.write_text(data.read_text().replace("Unknown.", "No idea."))
    with pytest.raises(UserError, match="other training data"):
        train.main(config, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, model=replace(c.model, path="nowhere")), "model.path: got nowhere"),
        (
            lambda c: replace(c, data=replace(c.data, per_step={"forget": 1, "foget": 1})),
            "'foget'",
        ),
        (
            lambda c: replace(c, data=replace(c.data, train=c.data.train.with_name("no.jsonl"))),
            r"no\.jsonl",
        ),
        (
            lambda c: replace(full(c), teacher=TeacherConfig(cache="off")),
            "teacher.cache: got off while all weights train",
        ),
        (
            lambda c: replace(c, objectives={"forget": c.objectives["forget"]}),
            "objectives: got none for role 'neighbor'",
        ),
    ],
    ids=["model", "role", "data", "cache", "objective"],
)
def test_a_mistake_leaves_no_output(config, change, message):
    with pytest.raises(UserError, match=message):
        train.main(change(config))
    assert not config.output.exists()


def test_non_finite_steps_are_skipped_and_counted(config, monkeypatch, capsys):
    original = HiddenCache.for_batch
    calls = []

    def poisoned(self, batch):
        rows = original(self, batch)
        calls.append(len(calls))
        if calls[-1] == 1:
            rows.hidden[0, 0] = torch.nan
        return rows

    steps = []
    update = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), update(self))[1])
    monkeypatch.setattr(HiddenCache, "for_batch", poisoned)
    with dying_at(4, pull_the_plug), pytest.raises(Power):
        train.main(config)
    result = train.main(config, resume=True)  # the count goes on too
    log = log_of(config)
    assert [entry["skipped"] for entry in log] == [0, 1, 0, 0, 0, 0]
    assert log[1]["loss"] is None
    assert len(steps) == 5
    assert "1 of 6 steps were skipped" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in load_file(result / WEIGHTS["adapter"]).values())


def test_keeps_the_latest_checkpoints(config):
    train.main(replace(config, keep_checkpoints=2))
    names = sorted(p.name for p in (config.output / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006"]


def test_damaged_checkpoint_is_named(config):
    with dying_at(5, pull_the_plug), pytest.raises(Power):
        train.main(config)
    (path,) = (config.output / "checkpoints" / "step-000004").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step-000004: cannot be read .*delete this folder"):
        train.main(config, resume=True)


def test_gradient_is_clipped(config):
    """Far below AdamW's epsilon no weight moves; the norm in the log is the one before."""
    clipped = replace(config, optim=replace(config.optim, clip_norm=1e-15))
    clipped = in_folder(clipped, config.output.with_name("clipped"))
    train.main(config)
    train.main(clipped)
    assert log_of(clipped)[0]["grad_norm"] == log_of(config)[0]["grad_norm"] > 0.01
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    largest = [
        load_file(c.output / "adapter" / WEIGHTS["adapter"])[up].abs().max()
        for c in (config, clipped)
    ]
    assert largest[0] > 1e-3
    assert largest[1] < 1e-6


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (3, 1.0), (14, 1.0), (15, 1.0), (16, 0.8), (19, 0.2)],
)
def test_learning_rate(step, expected):
    config = OptimConfig(lr=2.0, warmup_steps=4, decay_fraction=0.25)
    assert learning_rate(config, step, 20) == pytest.approx(2.0 * expected)


def test_learning_rate_without_warm_up_or_decay():
    config = OptimConfig(lr=2.0, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate(config, step, 5) for step in range(5)} == {2.0}


@pytest.mark.parametrize("name", ["adapter", "model", "checkpoints"])
def test_results_of_another_are_never_touched(config, name):
    (config.output / name).mkdir(parents=True)
    (config.output / name / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name} but no run\.json, expected a new folder"):
        train.main(config)
    assert (config.output / name / "precious.txt").read_text() == "mine"
    assert not (config.output / "run.json").exists()

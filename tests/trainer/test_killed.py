"""Runs of the command that are killed with SIGKILL at random moments, twenty in all, and resumed.

After each kill every checkpoint that carries a final name can be read; in the end the weights are
those of an undisturbed run, bit for bit. A run goes on after a kill only to be killed again, so
that one start serves for each. The random moments follow from the seed in the name of the test:

    BIDISTILL_KILL_SEED=123 pytest tests/trainer/test_killed.py

The run has dropout and a teacher by moving average: random generators and averages must be right.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bidistill import checkpoint
from bidistill.config import as_dict
from bidistill.prepare import prepare
from bidistill.update import make_optimizer
from bidistill.world import World

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("BIDISTILL_KILL_SEED") or random.SystemRandom().randrange(10**6))
STEPS = 120
EVERY = 4
"""Steps between checkpoints."""
PATIENCE_S = 120.0
ALONE = ["start", "step", "checkpoint", "step", "checkpoint", "checkpoint", "export"]
"""What a run in one process is in the middle of when it is killed, one after the other."""
TOGETHER = {
    False: [("checkpoint", "one rank"), ("step", "all"), ("export", "all")],
    True: [("step", "one rank"), ("checkpoint", "all"), ("export", "one rank")],
}
"""The same for two ranks, and who is killed; by whether checkpoints are written in the background.

Where a single rank is killed, torchrun ends the other one.
"""


def test_there_are_twenty_kills():
    assert 2 * len(ALONE) + sum(map(len, TOGETHER.values())) == 20


class Run:
    """A run of the command in a folder of its own, which is started again and again."""

    def __init__(self, config, folder, ranks=1, **changes):
        self.config = replace(config, output=folder / "run", **changes)
        self.checkpoints = self.config.output / "checkpoints"
        self.ranks = ranks
        folder.mkdir()
        self.said = folder / "said.txt"
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(as_dict(self.config)))  # JSON is YAML
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = ["-m", "bidistill.cli", "train", str(recipe), "--resume"]
        self.command = [sys.executable, *(launch if ranks > 1 else []), *program]

    def start(self):
        paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        with self.said.open("a") as said:
            streams = {"stdout": said, "stderr": subprocess.STDOUT}
            return psutil.Popen(self.command, cwd=ROOT, env=environment, **streams)

    def weights(self):
        return (self.config.output / "adapter/adapter_model.safetensors").read_bytes()

    def finish(self):
        """Let it run to its end; returns the weights."""
        assert self.start().wait(PATIENCE_S) == 0, self.said.read_text()[-3000:]
        return self.weights()

    def kill(self, moment, who, draw):
        """Start it, and kill it when the moment has come."""
        process = self.start()
        try:
            self.wait_for(moment, process, draw)
        finally:
            ranks = process.children() if self.ranks > 1 else []
            if who == "one rank":
                random_rank = draw.choice("01")
                next(p for p in ranks if p.environ()["RANK"] == random_rank).kill()
                ended = process.wait(PATIENCE_S) != 0
            else:  # torchrun first: it must not come to know that ranks have died
                for each in (process, *ranks):
                    each.kill()
                ended = process.wait(PATIENCE_S) == -9
            _, alive = psutil.wait_procs(ranks, PATIENCE_S)
        assert ended, "it was killed too late to prove anything"
        assert not alive

    def wait_for(self, moment, process, draw):
        if moment == "start":
            time.sleep(draw.uniform(0, 5))
            return
        target = STEPS if moment == "export" else self.steps() + draw.randint(2, 2 * EVERY)
        until = time.monotonic() + PATIENCE_S
        self.until(lambda: self.steps() >= target, process, until)
        if moment == "checkpoint":
            self.until(lambda: self.half_written(self.checkpoints), process, until)
            time.sleep(draw.uniform(0, 0.002))
        elif moment == "export":
            self.until(lambda: self.half_written(self.config.output), process, until)
        else:
            time.sleep(draw.uniform(0, 0.05))

    def until(self, condition, process, end):
        while not condition():
            assert process.poll() is None, f"ended: {self.said.read_text()[-3000:]}"
            assert time.monotonic() < end, self.said.read_text()[-3000:]
            time.sleep(0.0005)

    def steps(self):
        """Lines of the log."""
        log = self.config.output / "train_log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def half_written(self, folder):
        """What carries a temporary name."""
        return [name for name in os.listdir(folder) if name[0] == "."] if folder.exists() else []


def killed_and_resumed(run, moments, seed, readable):
    """Kill a run at each of the moments; returns its weights, and what kills left half written."""
    draw = random.Random(seed)
    left = []
    for moment, who in moments:
        run.kill(moment, who, draw)
        left += run.half_written(run.checkpoints)
        readable(run)
    weights = run.finish()
    readable(run)
    names = sorted(os.listdir(run.checkpoints))
    assert names == [f"step-{STEPS - EVERY:06d}", f"step-{STEPS:06d}"], "and nothing half written"
    assert run.half_written(run.config.output) == []
    assert run.steps() == STEPS
    assert json.loads((run.config.output / "cost.json").read_text())["steps"] == STEPS
    return weights, left


@pytest.fixture
def recipe(config):
    teacher = replace(config.teacher, kind="ema", ema_decay=0.9, cache="off")
    return replace(config, teacher=teacher, steps=STEPS, checkpoint_every=EVERY, threads=1)


@pytest.fixture
def readable(recipe):
    """Loads all checkpoints of a run that carry a final name."""
    ready = prepare(recipe, World())
    parameters = list(checkpoint.trainable(ready.model).values())
    seen, one_at_a_time = [], threading.Lock()

    def load_all(run):
        with one_at_a_time:
            load(run)

    def load(run):
        optimizer = make_optimizer(parameters, recipe.optim)
        for path in checkpoint.numbered(run.checkpoints).values():
            state = checkpoint.load(path, ready.model, optimizer, World(), ready.teacher.tensors())
            assert checkpoint.at(run.checkpoints, state["step"]) == path
            seen.append(path)

    yield load_all
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
def test_one_process(recipe, readable, tmp_path, seed):
    runs = [
        Run(recipe, tmp_path / name, async_checkpoints=name == "background")
        for name in ("foreground", "background")
    ]
    moments = [(moment, "all") for moment in ALONE]
    with ThreadPoolExecutor() as pool:  # each is one process
        undisturbed = pool.submit(Run(recipe, tmp_path / "undisturbed").finish)
        found = [
            pool.submit(killed_and_resumed, run, moments, seed + n, readable)
            for n, run in enumerate(runs)
        ]
        for future in found:
            weights, left = future.result()
            assert weights == undisturbed.result()
            assert left, "no kill hit a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED])
def test_two_ranks(recipe, readable, tmp_path, seed):
    undisturbed = Run(recipe, tmp_path / "undisturbed", ranks=2).finish()
    lefts = []
    for background, moments in TOGETHER.items():
        run = Run(recipe, tmp_path / str(background), ranks=2, async_checkpoints=background)
        weights, left = killed_and_resumed(run, moments, seed, readable)
        assert weights == undisturbed
        lefts += left
    assert lefts, "no kill hit a checkpoint"

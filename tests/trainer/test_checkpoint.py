"""Checkpoints in the foreground and in the background: the same, of the moment they are of."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bidistill import checkpoint, circumstances, run_folder, train
from bidistill.checkpoint_writer import Writer
from bidistill.config import OptimConfig, ParallelConfig
from bidistill.errors import UserError
from bidistill.teacher.kinds import Ema
from bidistill.update import make_optimizer
from bidistill.world import World
from tests.trainer import cut, cut_teachers
from tests.trainer.cut import Case
from tests.trainer.ranks import Ranks

WAIT_S = 30.0
"""Longer than anything here takes."""


@pytest.fixture(scope="module")
def two_ranks():
    group = Ranks(2)
    yield group
    group.stop()


class Run:
    """A model, its optimiser and the moving average of its weights, after one update."""

    def __init__(self):
        case = Case("lora", double=False)
        self.model = cut.model_of(case, World())
        self.parameters = list(checkpoint.trainable(self.model).values())
        self.optimizer = make_optimizer(self.parameters, OptimConfig(lr=0.1))
        self.teacher = Ema(self.model, cut.config_of(case).model, decay=0.5)
        self.update()

    def update(self):
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.teacher.after_step(updated=True)

    def save(self, writer, step, protect=None):
        writer.save(self.model, self.optimizer, {"step": step}, self.teacher.tensors(), protect)

    def tensors(self):
        now = checkpoint.tensors(self.model, self.optimizer, World(), self.teacher.tensors())
        return {name: tensor.clone() for name, tensor in now.items()}


@pytest.fixture
def run():
    return Run()


def files_of(path):
    """What the files of a checkpoint say; of tensors header and bytes apart.

    safetensors writes the header's metadata in random order.
    """
    return {file.name: parts_of(file) for file in path.iterdir()}


def parts_of(file):
    content = file.read_bytes()
    if file.suffix == ".json":
        return json.loads(content)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, content[end:]


def read(path):
    (file,) = path.glob("*.safetensors")
    return load_file(file)


@contextmanager
def held(monkeypatch, also=lambda: None):
    """Writing begins, and goes no further before the event is set."""
    begun, go_on = threading.Event(), threading.Event()
    original = checkpoint.save_tensors

    def held_up(*arguments, **keywords):
        begun.set()
        assert go_on.wait(WAIT_S)
        also()
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", held_up)
        try:
            yield begun, go_on
        finally:
            go_on.set()


def test_background_writes_what_the_foreground_does(run, tmp_path):
    for name in ("foreground", "background"):
        with Writer(tmp_path / name, 1, background=name == "background") as writer:
            run.save(writer, 1)
    first, second = (files_of(tmp_path / n / "step-000001") for n in ("foreground", "background"))
    assert first == second
    assert len(first) == 2, "tensors and state"


def test_background_writes_the_moment_it_was_asked_in(run, tmp_path, monkeypatch):
    expected = run.tensors()
    assert {name.split("/")[0] for name in expected} == {
        *("weights", "optimizer", "teacher", "random")
    }
    assert {n.rpartition("/")[2] for n in expected if n.startswith("optimizer")} == {
        *checkpoint.MOMENTS
    }
    with Writer(tmp_path, 1, background=True) as writer, held(monkeypatch) as (begun, go_on):
        run.save(writer, 1)
        assert begun.wait(WAIT_S)
        run.update()
        torch.rand(1)
        go_on.set()
    found, later = read(tmp_path / "step-000001"), run.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(later[name], tensor) for name, tensor in expected.items())


def test_training_goes_on_while_one_is_written_and_the_next_save_waits(run, tmp_path, monkeypatch):
    with Writer(tmp_path, 2, background=True) as writer, held(monkeypatch) as (begun, go_on):
        run.save(writer, 1)
        assert begun.wait(WAIT_S)
        assert checkpoint.latest(tmp_path) is None, "it has its name before it is complete"
        second = threading.Thread(target=run.save, args=(writer, 2))
        second.start()
        second.join(0.3)
        assert second.is_alive(), "the second did not wait for the first"
        assert [path.name for path in tmp_path.iterdir()] == [".step-000001.tmp"]
        go_on.set()
        second.join(WAIT_S)
        assert not second.is_alive()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("ends", ["normally", "by an error", "by Ctrl-C"])
def test_what_is_in_flight_is_finished(run, tmp_path, monkeypatch, ends):
    error = {"normally": None, "by an error": ZeroDivisionError, "by Ctrl-C": SystemExit}[ends]

    def work():
        with held(monkeypatch) as (_, go_on), Writer(tmp_path, 2, background=True) as writer:
            run.save(writer, 1)
            threading.Timer(0.3, go_on.set).start()  # once its end is waited for
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def full_disk():
    raise OSError(28, "No space left\non device")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("asked", ["save", "finish", "end"])
def test_an_error_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, background, asked):
    with held(monkeypatch, also=full_disk) as (_, go_on):
        go_on.set()

        def work():
            with Writer(tmp_path, 2, background=background) as writer:
                run.save(writer, 1)
                if asked == "save":
                    run.save(writer, 2)
                elif asked == "finish":
                    writer.finish()

        with pytest.raises(UserError) as caught:
            work()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'step-000001'}: cannot be written (OSError: [Errno 28]")
    assert message.endswith("then go on with --resume")
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_one_rank_is_raised_on_all(two_ranks, tmp_path):
    for background in (False, True):
        for rank in range(2):
            said = two_ranks.run(
                cut.failing, Case("lora", double=False), tmp_path, rank, background
            )
            assert said[0] == said[1]
            assert "No space left on device" in said[0], (background, rank)
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [cut, cut_teachers])
def test_two_ranks_resume_bit_for_bit_from_the_background(two_ranks, tmp_path, module):
    case = Case("full" if module is cut else "lora", tied=False, double=False)
    first, *_ = two_ranks.run(module.saved, case, tmp_path, True)
    again, *_ = two_ranks.run(module.restored, case, tmp_path)
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_ranks_write_the_same_in_the_background(two_ranks, tmp_path):
    case = Case("full", double=False)
    for name, background in (("foreground", False), ("background", True)):
        two_ranks.run(cut.saved, case, tmp_path / name, background)
    names = [
        {f.name for f in (tmp_path / n / "step-000002").iterdir()}
        for n in ("foreground", "background")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    random = {name for name in read_all(tmp_path / "foreground") if name.startswith("random/")}
    assert random == {"random/0/cpu", "random/1/cpu"}
    found = [read_all(tmp_path / name) for name in ("foreground", "background")]
    assert found[0].keys() == found[1].keys()
    for name in found[0].keys() - random:  # the generators have gone on
        assert torch.equal(found[0][name], found[1][name]), name


def read_all(folder):
    tensors = {}
    for file in (folder / "step-000002").glob("*.safetensors"):
        tensors |= {
            name if name.startswith("random/") else f"{file.name}/{name}": tensor
            for name, tensor in load_file(file).items()
        }
    return tensors


def test_a_protected_checkpoint_stays(run, tmp_path):
    with Writer(tmp_path, 2) as writer:
        for step in range(1, 7):
            run.save(writer, step, protect=2)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "5", "6"]


def test_steps_are_numbers_and_other_names_not_ours(run, tmp_path):
    (tmp_path / "step-000009-good").mkdir()
    with Writer(tmp_path, 2) as writer:
        for step in (999_998, 999_999, 1_000_000):
            run.save(writer, step)
    assert list(checkpoint.numbered(tmp_path)) == [999_999, 1_000_000]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    assert (tmp_path / "step-000009-good").exists()


def test_one_of_the_same_step_is_replaced(run, tmp_path):
    with Writer(tmp_path, 2) as writer:
        run.save(writer, 1)
        run.update()
        expected = run.tensors()
        run.save(writer, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    (file,) = (tmp_path / "step-000001").glob("*.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(file).items())


def test_a_run_in_the_background_ends_with_the_same_bits(config):
    in_background = replace(
        config, output=config.output.with_name("background"), async_checkpoints=True
    )
    results = [train.main(c) / "adapter_model.safetensors" for c in (config, in_background)]
    assert results[0].read_bytes() == results[1].read_bytes()
    last = [c.output / "checkpoints/step-000006" for c in (config, in_background)]
    first, second = map(files_of, last)
    timeless = first.pop("state.json"), second.pop("state.json")
    assert first == second
    assert len(first) == 1
    assert timeless[0] | {"seconds": 0} == timeless[1] | {"seconds": 0}


def test_resume_says_what_is_not_as_it_was(config, capsys):
    train.main(replace(config, steps=4))
    folder = config.output
    state_file = folder / "checkpoints/step-000004/state.json"

    def resume(**changes):
        for file in (folder / "adapter").iterdir():
            file.unlink()
        (folder / "adapter").rmdir()
        train.main(replace(config, steps=4, **changes), resume=True)
        return [line for line in capsys.readouterr().out.splitlines() if "resuming with" in line]

    assert resume() == []
    state = json.loads(state_file.read_text())
    now = state["circumstances"]
    assert now["versions"]["torch"] == torch.__version__
    assert now["cut"]["ranks"] == 1
    now["versions"] |= {"torch": "2.0.0", "peft": "0.1", "tokenizers": "0.1"}
    now["cut"]["ranks"] = 8
    state_file.write_text(json.dumps(state))
    versions, cut_up = resume(parallel=ParallelConfig(accumulate=2))
    assert versions.startswith(f"resuming with torch {torch.__version__} (before: 2.0.0), peft ")
    assert versions.endswith("(before: 0.1): results may differ by rounding")
    assert "tokenizers" not in versions
    assert cut_up == (
        "resuming with ranks 1 (before: 8), parallel.accumulate 2 (before: 1): equal up to "
        "rounding, not bit for bit"
    )


def test_a_checkpoint_from_before_they_were_recorded_is_read(config, capsys):
    train.main(replace(config, steps=2))
    state_file = config.output / "checkpoints/step-000002/state.json"
    state = json.loads(state_file.read_text())
    for name in ("circumstances", "tokens", "seconds"):
        del state[name]
    state_file.write_text(json.dumps(state))
    (config.output / "adapter").rename(config.output.with_name("away"))
    train.main(replace(config, steps=2), resume=True)
    assert "resuming with" not in capsys.readouterr().out


class Apart(World):
    """The second of two ranks, on a machine that does not have the first one's disk."""

    def __init__(self):
        super().__init__(rank=1, size=2)

    def share(self, item):
        return item

    def barrier(self):
        pass

    def any(self, here):
        return here


def test_ranks_without_a_disk_in_common_are_refused_before_the_first_step(config):
    with pytest.raises(UserError, match=r"^output: got .*, which not all ranks share, exp"):
        run_folder.begin(config, {}, Apart())


def test_ranks_see_each_others_disk(two_ranks, tmp_path):
    two_ranks.run(cut.shares_a_disk, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_of_the_result_is_cleared_away(config):
    config.output.mkdir()
    run_folder.begin(config, {}, World())
    for name in (".adapter.0123abcd.tmp", ".train_log.0123abcd.tmp.jsonl"):
        (config.output / name).mkdir()
        save_file({"half": torch.zeros(1)}, config.output / name / "half.safetensors")
    (config.output / ".adapter.mine").mkdir()
    run_folder.begin(config, {}, World())
    assert sorted(path.name for path in config.output.iterdir()) == [".adapter.mine", "run.json"]


def test_cost_is_of_all_starts(config, monkeypatch):
    original = train.train_step

    def dying(*arguments):
        if arguments[6] == 5:  # the fourth was saved, the fifth is done again
            raise ZeroDivisionError
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dying)
        with pytest.raises(ZeroDivisionError):
            train.main(config)
    assert not (config.output / "cost.json").exists()
    state = json.loads((config.output / "checkpoints/step-000004/state.json").read_text())
    state["seconds"] += 1000
    (config.output / "checkpoints/step-000004/state.json").write_text(json.dumps(state))
    train.main(config, resume=True)
    found = json.loads((config.output / "cost.json").read_text())
    lines = (config.output / "train_log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert found["steps"] == len(log) == 6
    assert found["tokens"] == sum(entry["tokens"] for entry in log) > 0
    assert 1000 < found["seconds"] < 1100
    assert found["ranks"] == len(found["peak_bytes"]) == 1
    # torch alone takes more than 100 MB
    assert 100 * 2**20 < found["peak_bytes"][0] < 64 * 2**30
    expected = "cuda allocations" if torch.cuda.is_available() else "resident set"
    assert found["peak_of"] == expected


def test_circumstances_are_those_of_here():
    cut_up = circumstances.now(ParallelConfig(), World(0, 3))["cut"]
    assert cut_up["ranks"] == cut_up["parallel.shard"] == 3
    if not torch.cuda.is_available():
        assert cut_up["device"] == f"CPU with {torch.get_num_threads()} threads"

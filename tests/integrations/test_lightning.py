"""bidistill.integrations.lightning under Lightning's own Trainer."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from bidistill.errors import UserError
from tests.support import assert_close

pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch import Callback

from bidistill.integrations.collator import PairCollator
from examples import lightning_module as example
from examples.tiny import eager_kl, make_pairs, tiny_llama
from tests.integrations.lightning_run import Recorder, fit, gradients, pair_of_models
from tests.trainer.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
EXACT = 1e-12
"""Of fp64: sums are taken in another order."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # they would cost more
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),  # most have no such data
    # Lightning's own, of PyTorch's trees
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),  # logs every 50 steps
]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for step, others in zip(found, expected, strict=True):
        assert step.keys() == others.keys()
        for name, gradient in others.items():
            assert (step[name] - gradient).norm() <= EXACT * gradient.norm(), name


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (3, 3), (1, 8), (5, 2)])
def test_an_update_does_not_depend_on_the_cut(batch_size, accumulate):
    _, whole = fit(8, max_epochs=3)
    _, cut = fit(batch_size, max_epochs=3, accumulate_grad_batches=accumulate)
    assert_equal(gradients(cut), gradients(whole))


def test_a_short_last_window_counts_its_own_tokens():
    _, cut = fit(2, max_epochs=1, accumulate_grad_batches=3)
    first, last = gradients(cut)
    _, whole = fit(6, max_epochs=1)
    assert_equal([first, last], gradients(whole))


def test_a_fit_does_not_count_what_an_interrupted_one_left():
    class Interrupted(Exception):
        pass

    class Interrupt(Callback):
        def on_train_batch_end(self, *arguments):
            raise Interrupted

    student, teacher = pair_of_models(wide=True)
    module = example.DistillationModule(student, partial(Recorder, lr=1e-2), teacher=teacher)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2}
    loader = DataLoader(make_pairs(), 4, collate_fn=PairCollator(padding=1))
    with pytest.raises(Interrupted):
        example.trainer(callbacks=[Interrupt()], **options).fit(module, loader)
    running = example.trainer(**options)
    running.fit(module, loader)
    _, whole = fit(8, max_epochs=1)
    assert_equal(gradients(running), gradients(whole))


def test_equals_the_objective_from_full_logits():
    _, running = fit(3, wide=False, max_epochs=1, accumulate_grad_batches=3)
    (found,) = gradients(running)

    def eager(wide):
        student, teacher = pair_of_models(wide)
        eager_kl(student, teacher, make_pairs()).backward()
        return {name: p.grad for name, p in student.named_parameters()}

    exact, own = eager(wide=True), eager(wide=False)
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert_close(name, gradient, exact[name], own[name])


def test_clipping_sees_the_divided_gradients():
    _, running = fit(4, max_epochs=1, accumulate_grad_batches=2)
    (free,) = gradients(running)
    norm = torch.stack([g.norm() for g in free.values()]).norm().item()
    for limit in (2 * norm, norm / 2):
        _, running = fit(4, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=limit)
        (clipped,) = gradients(running)
        found = torch.stack([g.norm() for g in clipped.values()]).norm().item()
        assert found == pytest.approx(min(norm, limit), rel=1e-5)  # Lightning adds 1e-6


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "tests/integrations/lightning_run.py", str(tmp_path / "gradients.pt")]
    done = _run(command)
    assert done.returncode == 0, done.stderr
    _, whole = fit(8, max_epochs=2)
    assert_equal(torch.load(tmp_path / "gradients.pt"), gradients(whole))


def test_the_teacher_is_neither_saved_nor_trained():
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    module = example.DistillationModule(student.eval(), torch.optim.AdamW, teacher=teacher)
    assert module.model.training
    names = {f"model.{name}" for name in student.state_dict()}
    assert module.state_dict().keys() == names
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}


def test_validation_weighs_by_answer_tokens():
    _, teacher = pair_of_models(wide=False)
    module = example.module()
    pairs = make_pairs()
    loader = DataLoader(pairs, 3, collate_fn=PairCollator(padding=1))
    (logged,) = example.trainer().validate(module, loader, verbose=False)
    expected = eager_kl(module.model, teacher, pairs).item()
    assert logged["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_validation_without_a_fit_moves_the_teacher_along(monkeypatch):
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    module = example.DistillationModule(student, torch.optim.AdamW, teacher=teacher)
    devices = []
    monkeypatch.setattr(teacher, "to", devices.append)
    example.trainer().validate(module, example.loader(8), verbose=False)
    assert devices == [torch.device("cpu")]


def test_the_size_of_chunks_goes_to_the_loss():
    module = example.DistillationModule(tiny_llama(), torch.optim.AdamW, chunk_bytes=1 << 16)
    assert module.model.bidistill_attachment.chunk_bytes == 1 << 16


def test_mixed_precision_is_the_trainers_business():
    _, exact = fit(8, wide=False, max_epochs=1)
    _, mixed = fit(4, wide=False, max_epochs=1, accumulate_grad_batches=2, precision="bf16-mixed")
    (expected,), (found,) = gradients(exact), gradients(mixed)
    error = torch.stack([(found[n] - g).norm() for n, g in expected.items()]).norm()
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    assert 0 < error < 0.1 * scale


def test_a_strategy_that_keeps_the_gradients_is_refused():
    class DeepSpeedStrategy:
        pass

    module = example.module()
    module._trainer = SimpleNamespace(strategy=DeepSpeedStrategy())  # type: ignore
    with pytest.raises(UserError, match="strategy: got DeepSpeedStrategy, expected one whose grad"):
        module.on_fit_start()


@pytest.mark.parametrize("missing", [["lightning"], ["lightning", "pytorch_lightning"]])
def test_the_older_name_of_the_package_serves_too(missing):
    if len(missing) == 1:
        pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
from bidistill.errors import UserError
try:
    from bidistill.integrations.lightning import DistillationModule
except UserError as error:
    print(error)
else:
    print(DistillationModule.__mro__[1].__module__)
"""
    said = _run([sys.executable, "-c", code]).stdout
    expected = ["pytorch_lightning.core.module", "lightning: got none that can be imported"]
    assert said.startswith(expected[len(missing) - 1])


@pytest.mark.filterwarnings("ignore:.*tensorboardX. has been removed")  # the default logger's
def test_the_code_of_the_page_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs/integrations/lightning.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    before = model.lm_head.weight.detach().clone()
    pairs = make_pairs()
    exec(code, {"model": model, "pairs": pairs, "tokenizer": make_tokenizer()})
    assert not torch.equal(model.lm_head.weight, before)
    saved = type(model).from_pretrained(tmp_path / "trained")
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)


def test_the_two_steps_to_time_compute_the_same():
    assert example.fused_step()() == pytest.approx(example.eager_step()().item(), rel=1e-5)


@pytest.mark.slow
def test_the_example_runs():
    done = _run([sys.executable, "examples/lightning_module.py"])
    assert done.returncode == 0, done.stderr
    assert "nats per token" in done.stdout


def _run(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

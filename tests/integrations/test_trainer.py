"""The stock Trainer and a plain loop with accelerate, run as their examples run them."""

import copy
import os

import pytest
import torch
from transformers import LlamaForCausalLM

from bidistill.errors import UserError
from bidistill.integrations.attach import attach, detach
from bidistill.integrations.collator import PairCollator
from examples import accelerate_loop, hf_trainer
from examples.tiny import make_pairs, tiny_llama
from tests.integrations.eager import PEFT_WARNINGS

pytestmark = [
    *PEFT_WARNINGS,
    # a loader pins memory if it may, and says that it may not where there is no accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
FULL = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "seed": 5}


def weights(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    return vector.detach().cpu()


def trained(folder, batch_size, accumulate, model=None, **arguments):
    """Full fine-tuning of 16 pairs, 8 a step, by the Trainer of the example."""
    trainer = hf_trainer.make_trainer(
        str(folder),
        attach(model or tiny_llama(), teacher=tiny_llama(seed=1)),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        use_cpu=True,
        **FULL | arguments,
    )
    trainer.train_dataset = make_pairs(16)
    return hf_trainer.losses(trainer), weights(trainer.model)


def test_examples(capsys):
    hf_trainer.main()
    accelerate_loop.main()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss before")]
    assert len(said) == 2


@pytest.mark.parametrize("example", [hf_trainer, accelerate_loop])
def test_timed_steps_do_the_same(example, monkeypatch):
    """What the fused and the eager step leave behind: the same gradients."""
    models = []
    make = "adapted" if example is hf_trainer else "tiny_llama"
    build = getattr(example, make)
    monkeypatch.setattr(example, make, lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    found = []
    for step in (example.fused_step, example.eager_step):
        models.clear()
        step()()
        found.append({n: p.grad for n, p in models[0].named_parameters() if p.grad is not None})
    assert found[0]
    assert found[0].keys() == found[1].keys()
    largest = max(gradient.abs().max() for gradient in found[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=0, atol=1e-5 * largest)


def test_batches_and_accumulation_agree(tmp_path):
    start = weights(tiny_llama())
    losses, expected = trained(tmp_path, 8, 1)
    moved = (expected - start).abs().max()
    assert moved > 0.01
    for batch_size, accumulate in ((4, 2), (1, 8)):
        other, found = trained(tmp_path, batch_size, accumulate)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * moved.item())
        assert other == pytest.approx(losses, rel=1e-3)  # the Trainer rounds what it logs


def test_a_class_that_would_not_be_told_the_count(tmp_path, monkeypatch):
    """Such as Qwen2.5-VL: unattached, the Trainer takes the mean of its batches' means."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    model = tiny_llama()
    _, expected = trained(tmp_path, 8, 1, model)
    _, found = trained(tmp_path, 1, 8)
    moved = (expected - weights(tiny_llama())).abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * moved.item())
    plain = {
        k: v for k, v in PairCollator(1)(make_pairs(2)).items() if not k.startswith("teacher_")
    }
    model.eval()
    mean = model(**plain).loss
    assert torch.equal(model(**plain, num_items_in_batch=1).loss, mean)
    with pytest.raises(UserError, match=r"num_items_in_batch: got it in training.*detach"):
        model.train()(**plain, num_items_in_batch=1)
    detach(model)
    assert "accepts_loss_kwargs" not in vars(model)
    model.accepts_loss_kwargs = False
    assert attach(model).accepts_loss_kwargs
    assert vars(detach(model))["accepts_loss_kwargs"] is False


def test_refuses_ligers_forward(tmp_path):
    """The Trainer has Liger replace the forward as training begins."""
    pytest.importorskip("liger_kernel", reason="needs Liger")
    trainer = hf_trainer.make_trainer(
        str(tmp_path),
        attach(tiny_llama()),
        use_cpu=True,
        use_liger_kernel=True,
        liger_kernel_config={"rope": False, "rms_norm": False, "swiglu": False},
    )
    with pytest.raises(UserError, match=r"model\.forward: got another one.*use_liger_kernel=False"):
        trainer.train()


def test_two_ranks_are_one(tmp_path, ranks):
    _, expected = trained(tmp_path, 8, 1)
    for _, found in ranks.run(trained, tmp_path, 4, 1):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def loop(batch_size, batches):
    return accelerate_loop.train(make_pairs(16), batch_size, batches)


def loop_of_rank(batch_size, batches):
    # as `accelerate launch --cpu` does; else accelerate takes ranks without a GPU for one process
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return loop(batch_size, batches)


def test_a_plain_loop_agrees(ranks):
    losses, expected = loop(8, 1)
    for cut in ((4, 2), (1, 8)):
        other, found = loop(*cut)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert other == pytest.approx(losses, rel=1e-5)
    for other, found in ranks.run(loop_of_rank, 2, 2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert other == pytest.approx(losses, rel=1e-5)


def test_bf16_and_checkpointing_and_evaluation(tmp_path):
    """What a Trainer is often asked for besides."""
    model = attach(hf_trainer.adapted())
    trainer = hf_trainer.make_trainer(
        str(tmp_path), model, bf16=True, activation_checkpointing=True, use_cpu=True
    )
    found = hf_trainer.losses(trainer)
    assert found[-1] < 0.7 * found[0]
    held_out = make_pairs(4, seed=3)
    evaluated = trainer.evaluate(held_out)["eval_loss"]
    with torch.no_grad():
        expected = model(**PairCollator(1)(held_out)).loss.item()
    assert evaluated == pytest.approx(expected, rel=0.05), "in bf16, over batches of other sizes"
    assert detach(model).forward.__func__ is type(model).forward, "autocast is gone as well"


def test_saved_models_are_ordinary(tmp_path):
    """What the Trainer saves of an attached model is what it would save of the model."""
    model = tiny_llama()
    other = attach(copy.deepcopy(model))
    for name, each in (("plain", model), ("attached", other)):
        hf_trainer.make_trainer(str(tmp_path), each).save_model(str(tmp_path / name))
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "attached").iterdir())
    for name in {"model.safetensors", "config.json"}:
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "attached" / name
        ).read_bytes()

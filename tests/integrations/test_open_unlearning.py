"""bidistill.integrations.open_unlearning against open-unlearning's interface, not itself."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from bidistill.errors import UserError
from examples.tiny import eager_kl, make_pairs
from tests.integrations.eager import assert_all_close, backward, nearby
from tests.integrations.open_unlearning_interface import (
    TRAINERS,
    Collator,
    UnlearnTrainer,
    item,
    load_trainer,
    register,
)
from tests.trainer.cut import double
from tests.trainer.tiny import make_tokenizer

PAGE = Path(__file__).parents[2] / "docs/integrations/open-unlearning.md"
BEGIN, END = 0, 1


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The trainer that the page shows, registered as it says."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trainer", "trainer.unlearn", "trainer.unlearn.base"):
            patch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["trainer.unlearn.base"].UnlearnTrainer = UnlearnTrainer
        exec(code, {"_register_trainer": register, "__name__": "trainer"})


@pytest.fixture(scope="module")
def config():
    """The configuration that the page shows."""
    text = PAGE.read_text().split("```yaml\n")[1].split("```")[0]
    shown = yaml.safe_load(text)
    del shown["defaults"]  # Hydra's
    return shown


def sequences(begin=True):
    """Forget and retain pairs; the prompts begin with the token that says so, or do not.

    Turns end with the token that pads, too.
    """
    pairs = make_pairs()
    for pair in pairs:
        prompt = pair["prompt_ids"]
        pair["prompt_ids"] = [BEGIN] * begin + prompt[:2] + [END] + prompt[2:]
        pair["answer_ids"] += [END]
    return pairs[:4], pairs[4:]


def dataset(begin=True, alternate=False):
    forget, retain = (
        [item(pair["prompt_ids"], pair["answer_ids"]) for pair in pairs]
        for pairs in sequences(begin)
    )
    if alternate:
        # what is to be trained on is the answer of another pair
        forget = [{"original": forget[i - 1], "alternate": forget[i]} for i in range(4)]
    return [{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)]


def trainer_of(config, folder, side="right", model=None, data=None, **args):
    args = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True} | args
    args["dataloader_pin_memory"] = False  # there is no accelerator to pin it for
    data = data or dataset()
    collator = Collator(make_tokenizer().pad_token_id, side)
    return load_trainer(config, model or nearby(), data, make_tokenizer(), collator, args)


def loss_of(trainer, part=slice(None)):
    batch = trainer.data_collator(trainer.train_dataset[part])
    return trainer.compute_loss(trainer.model, batch)


def moved(model):
    """As if training had gone on for a while: the retain loss has something to hold back."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 + index)
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def eager(config, begin=True, prepare=lambda model: None):
    """Loss and gradients from full logits."""
    forget, retain = sequences(begin)
    told = make_tokenizer()(config["method_args"]["context"], add_special_tokens=False)["input_ids"]
    student, teacher = moved(nearby()), nearby()
    for model in (student, teacher):
        prepare(model)
    for pair in forget:
        prompt = pair["prompt_ids"]
        pair["teacher_prompt_ids"] = prompt[: int(begin)] + told + prompt[int(begin) :]
    for pair in retain:
        pair["teacher_prompt_ids"] = pair["prompt_ids"]
    weights = config["method_args"]
    options = weights["loss_options"]
    loss = weights["gamma"] * eager_kl(student, teacher, forget, **options)
    loss = loss + weights["alpha"] * eager_kl(student, teacher, retain, **options)
    return backward(student, loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("alternate", [True, False])
def test_equals_the_objective_from_full_logits(config, tmp_path, side, begin, alternate):
    changed = {"gamma": 0.7, "alpha": 1.3, "loss_options": {"forward": 0.9, "reverse": 0.2}}
    config = config | {"method_args": config["method_args"] | changed}
    data = dataset(begin, alternate)
    trainer = trainer_of(config, tmp_path, side, data=data)
    moved(trainer.model)
    found = backward(trainer.model, loss_of(trainer))
    assert_all_close(found, eager(config, begin, double), eager(config, begin))


def test_training_lowers_the_loss_and_leaves_the_teacher(config, tmp_path):
    args = {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trainer = trainer_of(config, tmp_path, logging_steps=1, save_strategy="no", **args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    for name, weight in nearby().state_dict().items():
        assert torch.equal(trainer.teacher.state_dict()[name], weight)


def test_accumulated_batches_count_alike(config, tmp_path):
    trainer = trainer_of(config, tmp_path)
    parts = [backward(trainer.model, loss_of(trainer, part)) for part in (slice(2), slice(2, 4))]
    args = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    args |= {"learning_rate": 1e3, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    data = dataset()
    trainer = trainer_of(config, tmp_path, data=data, **args)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    for name, before in nearby().named_parameters():
        step = (before - trainer.model.get_parameter(name)) / 1e3  # so large that it rounds little
        expected = (parts[0][name] + parts[1][name]) / 2
        assert (step - expected).norm() < 1e-5 * expected.norm(), name


def test_evaluation_is_the_trainers(config, tmp_path):
    trainer = trainer_of(config, tmp_path)
    batch = trainer.data_collator([row["retain"] for row in dataset()])
    loss, logits, _ = trainer.prediction_step(trainer.model, batch, False)
    expected = nearby()(**batch)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(trainer.compute_loss(trainer.model, batch), expected.loss)


def test_sequences_without_an_answer_are_left_out(config, tmp_path):
    data = dataset()
    whole = loss_of(trainer_of(config, tmp_path, data=data[:3]))
    empty = data[3]["forget"]["labels"]
    data[3]["forget"] = item(data[3]["forget"]["input_ids"].tolist(), [])
    data[3]["retain"] = item(data[3]["retain"]["input_ids"].tolist(), [])
    assert len(empty)
    torch.testing.assert_close(loss_of(trainer_of(config, tmp_path, data=data)), whole)
    with pytest.raises(UserError, match="labels: got a batch without a token that counts"):
        loss_of(trainer_of(config, tmp_path, data=data[3:]))


def test_refuses(config, tmp_path):
    data = dataset()
    labels = data[0]["forget"]["labels"]
    labels[-2] = -100
    with pytest.raises(UserError, match="labels: got ones that are not the last tokens"):
        loss_of(trainer_of(config, tmp_path, data=data))
    silent = config | {"method_args": config["method_args"] | {"context": " "}}
    with pytest.raises(UserError, match=r"method_args\.context: got none, exp"):
        trainer_of(silent, tmp_path)
    sharded = nearby()
    sharded.lm_head.weight.ds_id = 0
    with pytest.raises(UserError, match="model: got one that DeepSpeed ZeRO-3 has shared out"):
        trainer_of(config, tmp_path, model=sharded)
    with pytest.raises(UserError, match="model, tokenizer: got one of them not at all"):
        TRAINERS[config["handler"]](model=nearby(), context="x")

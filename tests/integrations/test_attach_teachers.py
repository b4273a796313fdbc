"""Teachers: the base model, the model as it is, another one; which cannot be had."""

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    get_peft_model,
)
from peft.tuners.lora import KasaConfig
from transformers import GPT2Config, GPT2LMHeadModel

from bidistill.errors import UserError
from bidistill.integrations.attach import attach, detach
from bidistill.models import adapters_off, own_rows
from bidistill_kernels import (
    bidirectional_kl_reference,
)
from examples.tiny import tiny_llama
from tests.integrations.eager import (
    PEFT_WARNINGS,
    assert_all_close,
    backward,
    batch,
    nearby,
    objective,
    with_lora,
)
from tests.support import Wide

pytestmark = PEFT_WARNINGS
IDS = torch.arange(2, 14)[None]


def test_a_teacher_with_a_padded_head():
    """Heads of one tokenizer may be padded to different sizes: the common ids are compared."""

    def common(student, teacher, target):
        return bidirectional_kl_reference(student[:, :4096], teacher[:, :4096], target)

    student, other = tiny_llama().double(), tiny_llama(seed=1).double()
    other.resize_token_embeddings(4160, mean_resizing=False)
    attach(student, teacher=other)
    with Wide():
        eager = backward(student, objective(student, other, common))
        assert_all_close(backward(student, student(**batch()).loss), eager, eager)


@pytest.mark.parametrize("rows", [4096 + 1024, 3072, 64])
def test_refuses_another_vocabulary(rows):
    other = tiny_llama()
    other.resize_token_embeddings(rows, mean_resizing=False)
    with pytest.raises(UserError, match=rf"teacher: got an LM head of {rows} rows .* of 4096"):
        attach(tiny_llama(), teacher=other)


def test_a_share_of_a_small_vocabulary_is_no_padding():
    other = tiny_llama()
    other.resize_token_embeddings(4096 + 512, mean_resizing=False)
    with pytest.raises(UserError, match="at most 5%"):
        attach(tiny_llama(), teacher=other)


def test_a_live_teacher_drops_nothing_and_modes_stay(monkeypatch):
    student = with_lora(lora_dropout=0.5, target_modules=["q_proj", "lm_head"]).train()
    student.base_model.model.model.layers[0].eval()
    modes = [module.training for module in student.modules()]
    attach(student, teacher="live")
    teachers = []

    def spy(model, padded):
        teachers.append(own_rows(model, padded))
        return teachers[-1]

    monkeypatch.setattr("bidistill.integrations.attached.own_rows", spy)
    assert student(**batch()).loss != student(**batch()).loss, "the student has dropout"
    assert torch.equal(teachers[0].hidden, teachers[1].hidden)
    assert [module.training for module in student.modules()] == modes


def test_refuses_itself_as_another_teacher():
    model = tiny_llama()
    with pytest.raises(UserError, match=r"teacher: got the model itself.*pass teacher='live'"):
        attach(model, teacher=model)


def test_a_teacher_may_be_detached_itself():
    other = attach(nearby())
    student = attach(tiny_llama(), teacher=other)
    expected = student(**batch()).loss
    detach(other)
    assert torch.equal(student(**batch()).loss, expected)
    assert torch.equal(attach(tiny_llama(), teacher=other)(**batch()).loss, expected)


@pytest.mark.parametrize("teacher", ["auto", "base"])
def test_refuses_a_base_that_is_trained(teacher):
    """It would move, and the teacher with it."""
    biased = get_peft_model(
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
        LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    )
    with pytest.raises(UserError, match=rf"got {teacher!r} .*\(bias='all'\).*bias='none'"):
        attach(biased, teacher=teacher)
    model = with_lora(modules_to_save=["lm_head"])
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)
    with pytest.raises(UserError, match=r"trains 1 parameters.*such as .*norm.weight.*'live'"):
        attach(model, teacher=teacher)
    norm.requires_grad_(False)
    attach(model, teacher=teacher)


@pytest.mark.parametrize("teacher", ["auto", "base"])
def test_refuses_a_base_below_adapters_that_are_no_layers(teacher):
    settings = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), settings)
    with pytest.raises(UserError, match=r"of ADAPTION_PROMPT, which are no layers.*'live'"):
        attach(model, teacher=teacher)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"kasa_config": KasaConfig()}, "kasa_config"),
    ],
    ids=str,
)
def test_refuses_a_base_that_adapters_have_rewritten(settings, how):
    """With them off, the model is neither the base nor what it was a moment ago."""
    base = tiny_llama()
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **settings))
    with adapters_off(model):
        assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
    for teacher in ("auto", "base"):
        with pytest.raises(UserError, match=rf"changed the weights .*\({how}\).*'live'"):
            attach(model, teacher=teacher)
    attach(model, teacher="live")


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "mica"])
def test_other_initialisations_leave_the_base(how):
    base = tiny_llama()
    expected = base(input_ids=IDS).logits
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=how)
    model = attach(get_peft_model(base, settings), teacher="base")
    with adapters_off(model):
        assert torch.equal(model(input_ids=IDS).logits, expected)

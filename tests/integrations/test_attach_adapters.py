"""Adapters below and on the head: which are right, which are refused, and when they come later."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel

from bidistill.errors import UserError
from bidistill.integrations.adapters import configs_of
from bidistill.integrations.attach import attach
from bidistill.integrations.attached import STATE
from bidistill_kernels import (
    bidirectional_kl_reference,
)
from examples.tiny import tiny_llama
from tests.integrations.eager import (
    PEFT_WARNINGS,
    asked,
    assert_all_close,
    backward,
    batch,
    nearby,
    objective,
    with_lora,
)
from tests.support import Wide

pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("teacher", ["base", "live"])
@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
def test_an_adapter_on_the_head(tied, teacher, kind):
    wants = {
        "lora": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.5},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
    }[kind]
    student = with_lora(tiny_llama(tied=tied).double(), **wants).double().eval()
    attach(student, teacher=teacher)
    reads = asked(tiny_llama(tied=tied).double() if teacher == "base" else student)
    with Wide():
        ours = backward(student, student(**batch()).loss)
        eager = backward(student, objective(student, reads, bidirectional_kl_reference))
    assert any("lm_head" in name for name in eager)
    assert_all_close(ours, eager, eager)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "of PROMPT_TUNING"),
        (
            LoraConfig(target_modules=["lm_head"], use_dora=True),
            "got a LoRA with DoraLinearVariant on the LM head",
        ),
        (
            LoraConfig(target_modules=["lm_head"], lora_bias=True),
            "got a LoRA with lora_bias on the LM head",
        ),
        (
            IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
            r"got a peft\.tuners\.ia3\.layer\.Linear on the LM head",
        ),
        (
            LoraConfig(
                target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]
            ),
            "got an activated LoRA",
        ),
    ],
    ids=["prompt tuning", "dora on the head", "bias on the head", "ia3 on the head", "alora"],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_refuses_adapters(settings, message):
    model = get_peft_model(tiny_llama(tied=False), settings)
    with pytest.raises(UserError, match=message):
        attach(model)


def test_refuses_a_regulariser_outside_of_the_model():
    def adapted(weight):
        settings = AdaLoraConfig(
            target_modules=["q_proj"],
            total_step=9,
            tinit=1,
            tfinal=1,
            orth_reg_weight=weight,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(tiny_llama(), settings)

    with pytest.raises(UserError, match=r"an ADALORA adapter with orth_reg_weight=0.5.*=0.0"):
        attach(adapted(0.5))
    attach(adapted(0.0))
    attach(tiny_llama(), teacher=adapted(0.5))  # of one that is not trained, nothing is left out


def test_refuses_merged_adapters():
    model = with_lora()
    model.merge_adapter()
    with pytest.raises(UserError, match=r"merged into the weights.*unmerge_adapter"):
        attach(model)
    model.unmerge_adapter()
    attach(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora on the head", "modules_to_save"],
)
@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_adapters_that_are_merged_later_are_refused(settings, whose):
    """Those of a head would count twice, and peft takes them out in the middle of a batch."""
    adapted = with_lora(tiny_llama(tied=False), **settings)
    student = attach(
        adapted if whose == "model" else tiny_llama(),
        teacher=nearby() if whose == "model" else adapted,
    )
    expected = student(**batch()).loss
    adapted.merge_adapter()
    with pytest.raises(UserError, match=f"^{whose}: got adapters that are merged"):
        student(**batch())
    adapted.unmerge_adapter()
    torch.testing.assert_close(student(**batch()).loss, expected)


@pytest.mark.parametrize("within", [False, True], ids=["around", "within"])
def test_the_teacher_is_chosen_when_it_is_attached(within):
    """Without adapters it is the model as it is, and stays that when some come."""
    model = attach(tiny_llama().double())
    student = with_lora(model).double()
    if within:
        student = attach(tiny_llama().double())
        student.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        student.double()
    with Wide():
        eager = backward(student, objective(student, student, bidirectional_kl_reference))
        assert_all_close(backward(student, student(**batch()).loss), eager, eager)


def test_second_adapters_that_come_later_are_switched_off_too():
    student = attach(with_lora().double())
    student.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    student.set_adapter("second")
    for name, parameter in student.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(parameter)
    student.double()
    base = tiny_llama().double()
    with Wide():
        eager = backward(student, objective(student, base, bidirectional_kl_reference))
        assert_all_close(backward(student, student(**batch()).loss), eager, eager)


def test_a_head_that_comes_later_is_refused():
    model = attach(tiny_llama(tied=False))
    student = with_lora(model, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"another LM head .* after adapters are added"):
        student(**batch())


LATER = {
    "biases": (
        LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
        "bias='all'",
    ),
    "no bases": (
        LoraConfig(target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True),
        "init_lora_weights='pissa'",
    ),
    "alora": (
        LoraConfig(
            target_modules=["c_attn"],
            task_type="CAUSAL_LM",
            alora_invocation_tokens=[5],
            fan_in_fan_out=True,
        ),
        "an activated LoRA",
    ),
}
"""Adapters that come after `attach`, and what is said of them."""


def add_around(model, settings):
    """Its forward is then called by that of peft, past the hooks of the model."""
    if isinstance(model, PeftModel):
        model.add_adapter("second", settings)
        return model
    return get_peft_model(model, settings)


def add_within(model, settings):
    model.add_adapter(settings, adapter_name=f"adapter {len(configs_of(model))}")
    return model


@pytest.mark.parametrize("add", [add_around, add_within])
@pytest.mark.parametrize("teacher", ["auto", "base", "live"])
@pytest.mark.parametrize("kind", LATER)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_that_come_later_are_checked(kind, teacher, add):
    """At the first batch; of a teacher that is the model as it is, the base may be trained."""
    settings, message = copy.deepcopy(LATER[kind])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2))
    if teacher == "base":
        model = add(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    student = add(attach(model, teacher=teacher), settings)
    if teacher != "base" and kind != "alora":
        assert student(**batch()).loss.isfinite()
        return
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            student(**batch())
        assert "\n" not in str(caught.value)


def test_a_base_that_is_trained_beside_later_adapters():
    """The check is of the batch, not of the moment that they come."""
    student = attach(with_lora())
    student.add_adapter("second", LoraConfig(target_modules=["up_proj"]))
    norm = student.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    with pytest.raises(UserError, match=r"trains 1 parameters beside its adapters"):
        student(**batch())
    norm.requires_grad_(False)
    assert student(**batch()).loss.isfinite()


def test_a_second_adapter_on_the_head_is_checked():
    """Its module stays the same, unlike that of a first one."""
    student = attach(with_lora(tiny_llama(tied=False), target_modules=["lm_head"]))
    student.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    assert student(**batch()).loss.isfinite()
    student.add_adapter("third", LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UserError, match="DoraLinearVariant on the LM head"):
        student(**batch())
    student.delete_adapter("third")
    assert student(**batch()).loss.isfinite()


def test_a_copy_checks_its_own_adapters():
    model = attach(with_lora())
    other = copy.deepcopy(model)
    attached = (vars(model)[STATE], vars(other)[STATE])
    for each, attachment in zip((model, other), attached, strict=True):
        before = attachment.adapters
        each(**batch())
        assert attachment.adapters is before, "the same adapters are not checked again"
    biased = LoraConfig(target_modules=["q_proj"], bias="all")
    other.add_adapter("second", biased)
    with pytest.raises(UserError, match="bias='all'"):
        other(**batch())
    assert model(**batch()).loss.isfinite()

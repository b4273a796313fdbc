"""Adapters below and on the head: which are right, which are refused, and when they come later."""

import pytest
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)

from bidistill.errors import UserError
from bidistill.integrations.attach import attach
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
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "got a Linear as LM head"),
        (
            LoraConfig(
                target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]
            ),
            "got an activated LoRA",
        ),
    ],
    ids=["prompt tuning", "dora on the head", "alora"],
)
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


def test_adapters_that_come_later_are_switched_off_too():
    model = attach(tiny_llama().double())
    student = with_lora(model).double()
    base = tiny_llama().double()
    with Wide():
        eager = backward(student, objective(student, base, bidirectional_kl_reference))
        assert_all_close(backward(student, student(**batch()).loss), eager, eager)


def test_a_head_that_comes_later_is_refused():
    model = attach(tiny_llama(tied=False))
    student = with_lora(model, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"another LM head .* after adapters are added"):
        student(**batch())

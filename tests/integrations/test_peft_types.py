"""Every type of adapter that peft has: right to the gradient, or refused by its name.

A type that peft adds is neither until somebody looks: the first test then fails.
"""

from contextlib import nullcontext

import pytest
import torch
from peft import PeftType, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from bidistill.errors import UserError
from bidistill.integrations.attach import attach
from bidistill_kernels import bidirectional_kl_reference
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

pytestmark = [
    *PEFT_WARNINGS,
    # some types warn of layers they were not made for, of compilers and of sparse matrices
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LAYERS = {"target_modules": ["q_proj", "down_proj"]}
SMALL = {**LAYERS, "r": 4}
VIRTUAL = {"num_virtual_tokens": 2}
FEW = {**LAYERS, "n_frequency": 20}
RIGHT = {
    "LORA": SMALL,
    "ADALORA": {**LAYERS, "total_step": 9, "tinit": 1, "tfinal": 1, "orth_reg_weight": 0.0},
    "ADAMSS": {"target_modules": ["q_proj"], "r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "BEFT": {"target_modules": ["q_proj"]},
    "BOFT": {**LAYERS, "boft_block_size": 4},
    "C3A": {**LAYERS, "block_size": 16},
    "DEFT": SMALL,
    "DELORA": LAYERS,
    "FOURIERFT": {**FEW, "scaling": 150.0},
    "FROD": LAYERS,
    "GLORA": SMALL,
    "GRALORA": SMALL,
    "HIRA": SMALL,
    "HRA": SMALL,
    "IA3": {**LAYERS, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": SMALL,
    "LOKR": SMALL,
    "MISS": SMALL,
    "OFT": {**LAYERS, "oft_block_size": 4},
    "OSF": {**LAYERS, "effective_rank": 8},
    "PEANUT": SMALL,
    "PSOFT": SMALL,
    "PVERA": SMALL,
    "RANDLORA": SMALL,
    "ROAD": LAYERS,
    "SHIRA": SMALL,
    "SUPERTUNING": LAYERS,
    "TINYLORA": {**LAYERS, "r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": list(range(0, 4096, 3))},
    "UNILORA": {**SMALL, "theta_d_length": 64},
    "VBLORA": {**LAYERS, "num_vectors": 16, "vector_length": 16},
    "VERA": SMALL,
    "WAVEFT": FEW,
}
"""What each is made with, where the loss is that of the model's own logits."""
AROUND = "runs around the model"
VIRTUAL_TOKENS = "virtual tokens are added outside"
REFUSED = {
    "CARTRIDGE": (VIRTUAL, VIRTUAL_TOKENS),
    "CPT": ({"cpt_token_ids": [3, 4], **VIRTUAL}, VIRTUAL_TOKENS),
    "LILY": ({**SMALL, "stride_A": 1, "num_B": 2}, "mixes by the mean over all tokens"),
    "MULTITASK_PROMPT_TUNING": (VIRTUAL, VIRTUAL_TOKENS),
    "POLY": ({**SMALL, "n_tasks": 2, "n_skills": 2, "n_splits": 1}, AROUND),
    "PREFIX_TUNING": (VIRTUAL, VIRTUAL_TOKENS),
    "PROMPT_TUNING": (VIRTUAL, VIRTUAL_TOKENS),
    "P_TUNING": (VIRTUAL, VIRTUAL_TOKENS),
    "SHADOW": ({}, AROUND),
}
"""What each is made with, and why its loss would be another."""
SINGLE_PRECISION = {"ADAMSS", "FOURIERFT"}
"""Their own forward does not run in fp64."""
TASKS = {"MULTITASK_PROMPT_TUNING", "POLY"}
"""They ask for the task of each sequence."""
NO_SWITCH = {"ADAPTION_PROMPT"}
"""They cannot be switched off."""


def make(name, settings, model=None):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]](task_type="CAUSAL_LM", **settings)
    # the vocabulary of an untied head is no layer of the embedding
    return get_peft_model(model or tiny_llama(tied=False), config).eval()


def trained(model, dtype):
    """Its adapters as if training had gone on for a while; fresh ones may do nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def test_every_type_is_accounted_for():
    known = {*RIGHT, *REFUSED, "XLORA"}
    assert known == {kind.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("name", RIGHT)
def test_equals_full_logits(name):
    dtype = torch.float32 if name in SINGLE_PRECISION else torch.float64
    student = trained(make(name, RIGHT[name]), dtype)
    live = name in NO_SWITCH
    attach(student, teacher="live" if live else "base")
    reads = asked(student if live else tiny_llama(tied=False).to(dtype))
    with Wide() if dtype is torch.float64 else nullcontext():
        ours = backward(student, student(**batch()).loss)
        eager = backward(student, objective(student, reads, bidirectional_kl_reference))
    assert_all_close(ours, {n: value.double() for n, value in eager.items()}, eager)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name):
    """Fresh ones too, before they do anything that a number would show."""
    settings, why = REFUSED[name]
    model = make(name, settings)
    for teacher in ("auto", "base", "live"):
        with pytest.raises(UserError, match=f"^model: got an adapter of {name}, .*{why}") as caught:
            attach(model, teacher=teacher)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^teacher: got an adapter of {name}, .*{why}"):
        attach(tiny_llama(tied=False), teacher=model)


@pytest.fixture
def mixed(tmp_path):
    """Settings of X-LoRA, over two adapters on files."""
    for seed in (0, 1):
        with_lora(seed=seed, task_type="CAUSAL_LM").save_pretrained(tmp_path / str(seed))
    return XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=64,
        xlora_depth=1,
        adapters={str(seed): str(tmp_path / str(seed)) for seed in (0, 1)},
    )


def base_of_mixed():
    model = tiny_llama()
    model.config.use_cache = False  # as X-LoRA asks for
    return model


def test_refuses_x_lora(mixed):
    """The loss would be that of plain LoRA, and the classifier would never be trained."""
    model = get_peft_model(base_of_mixed(), mixed)
    for teacher in ("auto", "base", "live"):
        with pytest.raises(UserError, match=f"^model: got an adapter of XLORA, .*{AROUND}"):
            attach(model, teacher=teacher)


@pytest.mark.parametrize("name", [*REFUSED, "XLORA"])
def test_refuses_them_when_they_come_later(name, mixed):
    model = attach(base_of_mixed())
    if name == "XLORA":
        student = get_peft_model(model, mixed)
    else:
        student = make(name, REFUSED[name][0], model)
    asks = {"task_ids": torch.zeros(8, dtype=torch.long)} if name in TASKS else {}
    with pytest.raises(UserError, match=r"virtual tokens|runs around the model|mixes by the mean"):
        student(**batch(), **asks)

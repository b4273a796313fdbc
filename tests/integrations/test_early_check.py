"""What is refused before anything trains: heads and models whose loss would be another's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    CpmAntConfig,
    Gemma3TextConfig,
    JetMoeConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    XLMConfig,
    XLNetConfig,
)

from bidistill.errors import UserError
from bidistill.integrations.attach import attach
from bidistill.integrations.early_check import checked_transform
from examples.tiny import tiny_llama
from tests.integrations import fsdp2_run
from tests.integrations.eager import PEFT_WARNINGS, with_lora

pytestmark = PEFT_WARNINGS
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPILT = 0.3
"""Share of the mean: more than rounds away, less than a quarter of what earlier tokens do."""
KEYS = {"num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TWO_WAYS = {
    "xlnet": XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=2, d_inner=48),
    "xlm": XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=2, embed_init_std=0.2),
    "bert-generation": BertGenerationConfig(**SIZES, is_decoder=False),
    "cpmant": CpmAntConfig(
        vocab_size=128, hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=48
    ),
}
ONE_WAY = {
    "bert-generation": BertGenerationConfig(**SIZES, is_decoder=True),
    # a window, and a sequence for the experts, shorter than what is run
    "gemma3": Gemma3TextConfig(**SIZES, **KEYS, sliding_window=4, sliding_window_pattern=2),
    "recurrent_gemma": RecurrentGemmaConfig(**SIZES, **KEYS, lru_width=32, attention_window_size=4),
    "mixtral": MixtralConfig(**SIZES, **KEYS, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **KEYS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "jetmoe": JetMoeConfig(**SIZES, kv_channels=16, num_key_value_heads=1, **EXPERTS),
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", TWO_WAYS)
def test_refuses_models_that_read_ahead(kind):
    """Their logits of a token are made with the very answer that they are to predict."""
    model = make(TWO_WAYS[kind])
    message = rf"^model: the logits of this {kind} model change by \S+ with the tokens .* later"
    with pytest.raises(UserError, match=message) as caught:
        attach(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message.replace("model", "teacher", 1)):
        attach(make(ONE_WAY["mixtral"]), teacher=model)


def test_refuses_bert_by_its_head():
    message = "^model: got a bert model, whose LM head is given something else"
    with pytest.raises(UserError, match=message):
        attach(make(BertConfig(**SIZES, is_decoder=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ONE_WAY)
def test_what_reads_no_further_passes(kind, dtype):
    """Whatever else ties its tokens together: windows, recurrent states, experts."""
    model = make(ONE_WAY[kind]).to(dtype)
    assert attach(model) is model


def test_reading_ahead_shows_in_16_bits():
    model = make(BertGenerationConfig(**SIZES, is_decoder=False)).bfloat16()
    with pytest.raises(UserError, match="that come later"):
        attach(model)


def rounded_elsewhere(norm, args, hidden):
    """As if later tokens had sent this one to another expert: a little of their mean."""
    return hidden + SPILT * hidden.mean(1, keepdim=True)


def test_a_rounding_is_no_reading_ahead():
    """In 16 bits it may come to several percent; in 32 that would be no rounding."""
    model = tiny_llama()
    model.model.norm.register_forward_hook(rounded_elsewhere)
    with pytest.raises(UserError, match="that come later"):
        attach(model)
    attach(model.bfloat16())


def mixing(norm, args, hidden):
    return hidden + 0.5 * hidden.mean(0, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refuses_a_mixing_of_the_batch(dtype):
    """It shows in no sequence alone, but in the loss of each batch."""
    model = tiny_llama().to(dtype)
    model.model.norm.register_forward_hook(mixing)
    with pytest.raises(UserError, match=r"in a batch of others .* or mixes the batch"):
        attach(model)


def other_tokens(model, args, kwargs):
    return args, kwargs | {"input_ids": kwargs["input_ids"].flip(1)}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_refuses_what_acts_around_the_backbone(adapted):
    """The loss runs the backbone, so a hook of the whole model would be left out of it."""
    model = with_lora() if adapted else tiny_llama()
    head = model.get_output_embeddings()
    before = dict(vars(model)), dict(vars(head))
    hook = model.register_forward_pre_hook(other_tokens, with_kwargs=True)
    message = "from those of its backbone and LM head alone"
    with pytest.raises(UserError, match=f"^model: the logits of this llama model .* {message}"):
        attach(model)
    with pytest.raises(UserError, match=f"^teacher: the logits of this llama model .* {message}"):
        attach(tiny_llama(), teacher=model)
    hook.remove()
    assert (vars(model), vars(head)) == before, "a refusal leaves no trace"
    attach(model)


class PackedHead(torch.nn.Module):
    """As GPTQ, AWQ and HQQ have them: no `nn.Linear`, and no weight of its shape."""

    def __init__(self, head):
        super().__init__()
        self.register_buffer("qweight", head.weight.detach().round().to(torch.int8))

    def forward(self, hidden):
        return hidden @ self.qweight.to(hidden.dtype).T


class CodedHead(torch.nn.Linear):
    """As bitsandbytes and FP8 have them: an `nn.Linear`, whose weight is a code."""

    def __init__(self, head, dtype):
        super().__init__(head.in_features, head.out_features, bias=False)
        code = head.weight.detach().mul(100).round().to(dtype)
        self.weight = torch.nn.Parameter(code, requires_grad=False)

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) / 100).T


QUANTISED = {
    "packed": PackedHead,
    "int8": lambda head: CodedHead(head, torch.int8),
    "uint8": lambda head: CodedHead(head, torch.uint8),
    "fp8": lambda head: CodedHead(head, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_refuses_quantised_heads(kind):
    model = tiny_llama(tied=False)
    model.lm_head = QUANTISED[kind](model.lm_head)
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all(), "the model itself runs"
    message = r"got a (Packed|Coded)Head as LM head, expected .* not quantised"
    with pytest.raises(UserError, match="^model: " + message) as caught:
        attach(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^teacher: " + message):
        attach(tiny_llama(tied=False), teacher=model)


def test_refuses_a_quantised_head_below_a_lora():
    model = tiny_llama(tied=False)
    model.lm_head = CodedHead(model.lm_head, torch.int8)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UserError, match=r"as LM head, expected .* not quantised"):
        attach(adapted)


def test_refuses_a_head_with_a_forward_of_its_own():
    model = tiny_llama()
    model.lm_head.forward = lambda hidden: type(model.lm_head).forward(model.lm_head, hidden)
    with pytest.raises(UserError, match=r"LM head whose forward somebody has replaced"):
        attach(model)


def test_refuses_logits_that_are_no_function_of_the_head():
    model = tiny_llama()
    model.config.logit_scale = 2.0  # llama ignores it
    with pytest.raises(UserError, match=r"^model: the logits of this llama model differ"):
        attach(model)
    with pytest.raises(UserError, match=r"^teacher: the logits of this llama model differ"):
        attach(tiny_llama(), teacher=model)


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_takes_what_is_shared_out_already(ranks, who, reshard):
    """Its head is whole in its forward alone, as `fully_shard` has it unless it is told not to."""
    expected = fsdp2_run.attach_shared_out(who, reshard, shared=False)
    for found in ranks.run(fsdp2_run.attach_shared_out, who, reshard):
        assert found.losses == pytest.approx(expected.losses, rel=1e-12)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("who", ["model", "teacher"])
def test_says_that_weights_are_not_finite(who):
    broken, overflowing = tiny_llama(), tiny_llama().half()
    broken.model.norm.weight.data[0] = float("nan")
    overflowing.model.norm.weight.data.fill_(torch.finfo(torch.float16).max)
    for model, dtype in ((broken, "float32"), (overflowing, "float16")):
        message = rf"^{who}: got a llama model in torch.{dtype}, whose hidden states .* not finite"
        with pytest.raises(UserError, match=message) as caught:
            attach(model) if who == "model" else attach(tiny_llama(), teacher=model)
        assert "\n" not in str(caught.value)


def test_draws_its_tokens_whatever_the_default_device():
    model = tiny_llama()
    torch.set_default_device("meta")
    try:
        checked_transform(model, "model")
    finally:
        torch.set_default_device(None)


def test_says_to_attach_before_accelerate_prepares():
    """Its autocast is around the model's forward, where the loss does not run yet."""
    model = tiny_llama()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(UserError, match=r"expected the same; attach before accelerator.prepare"):
        attach(model)

"""Loading refuses what cannot be trained; adapters go on and off without a trace."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from bidistill.config import LoraSettings, ModelConfig
from bidistill.errors import UserError
from bidistill.loading import load_base, load_model, load_tokenizer
from bidistill.models import (
    adapters_off,
    add_adapter,
    attach_distill_step,
    backbone,
    read_logit_transform,
    unwrapped,
)
from tests.trainer.tiny import make_model, randomise_adapters

TOKENS = torch.arange(2, 14)[None]
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def test_loads_fp32_masters_from_a_bf16_file(tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path)
    for adapter in (None, LoraSettings(rank=2)):
        model = load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16", adapter=adapter))
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert trained == {torch.float32}
        assert frozen == (set() if adapter is None else {torch.bfloat16})
    assert load_model(ModelConfig(path=str(tmp_path))).dtype == torch.float32


def test_refuses_folders_that_hold_no_whole_model(tmp_path, model_dir):
    with pytest.raises(UserError, match=r"model.path: got .*nowhere, expected a folder"):
        load_base(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_base(tmp_path)
    config = (model_dir / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    torch.save(make_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \*.safetensors file"):
        load_base(tmp_path)
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, the first is model.layers.1.mlp.up"):
        load_base(tmp_path)
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_adapter_layers_are_those_of_the_settings():
    model = add_adapter(make_model(), LoraSettings(rank=2, targets=("up_proj",), layers=(1, 2)))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{side}.default.weight"
        for i in (1, 2)
        for side in "AB"
    }
    assert names == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(targets=("q_porj",)), r"got 'q_porj'.*such as down_proj, gate_proj"),
        (LoraSettings(layers=(1, 3)), r"got \[1, 3\], expected 0 <= first <= last < 3"),
        (LoraSettings(layers=(2, 1)), r"got \[2, 1\]"),
    ],
)
def test_adapter_refuses(settings, message):
    with pytest.raises(UserError, match=f"model.adapter.*{message}"):
        add_adapter(make_model(), settings)


@torch.no_grad()
def test_adapters_off_is_the_base_model_and_leaves_no_trace():
    base = make_model()
    expected = base(input_ids=TOKENS).logits
    model = add_adapter(base, LoraSettings(rank=2))
    randomise_adapters(model)
    trained = [p.requires_grad for p in model.parameters()]
    changed = model(input_ids=TOKENS).logits
    assert (changed - expected).abs().max() > 0.1
    with adapters_off(model):
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, changed, rtol=0, atol=0)
    assert [p.requires_grad for p in model.parameters()] == trained


@torch.no_grad()
def test_attached_head_is_an_ordinary_head():
    model = add_adapter(make_model(), LoraSettings(rank=2))
    expected = model(input_ids=TOKENS).logits
    names = list(model.state_dict())
    attach_distill_step(model)
    torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=0, atol=0)
    assert list(model.state_dict()) == names
    hidden = torch.randn(3, 32)
    seen = model.get_output_embeddings()(hidden, fused=lambda *arguments: arguments)
    assert seen[0] is hidden
    assert seen[1] is unwrapped(model).lm_head.weight
    assert seen[2] is None


@pytest.mark.parametrize(
    "model_and_transform",
    [
        (Gemma2ForCausalLM, Gemma2Config(**TINY, final_logit_softcapping=3.0), (1.0, 3.0)),
        (GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=8.0), (0.125, None)),
        (CohereForCausalLM, CohereConfig(**TINY, logit_scale=0.25), (0.25, None)),
    ],
    ids=["gemma2", "granite", "cohere"],
)
@torch.no_grad()
def test_reads_logit_transform(model_and_transform):
    kind, config, expected = model_and_transform
    torch.manual_seed(0)
    model = kind(config).eval()
    transform = read_logit_transform(model)
    assert (transform.scale, transform.softcap) == expected
    hidden = backbone(model)(input_ids=TOKENS, use_cache=False).last_hidden_state
    logits = model(input_ids=TOKENS).logits
    torch.testing.assert_close(transform(model.lm_head(hidden)), logits)


def test_refuses_a_model_whose_logits_are_another_function_of_its_head():
    model = make_model()
    model.config.logit_scale = 2.0  # llama ignores it
    with pytest.raises(UserError, match=r"logits of this llama model differ.*scale=2.0"):
        read_logit_transform(model)


@pytest.mark.parametrize("damage", ["truncated", "unknown type"])
def test_a_damaged_model_is_one_line(model_dir, tmp_path, damage):
    shutil.copytree(model_dir, tmp_path / "model")
    weights, config = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config.write_text(config.read_text().replace('"llama"', '"lama"'))
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); expected a model") as caught:
        load_base(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_targets_are_linear_layers(model_dir):
    for target in ("self_attn", "embed_tokens"):
        with pytest.raises(UserError, match="names no linear layer of this model"):
            add_adapter(load_base(model_dir), LoraSettings(targets=(target,)))

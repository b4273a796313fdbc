"""Model families: the fused loss is that of the model's own logits, whatever it does to them.

Every family has random weights, so nothing is downloaded. What differs between them is what follows
the LM head: nothing, a bias, a soft-cap, a factor, a divisor; and whether the head is tied.
"""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAEConfig,
    CohereConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MarianConfig,
    MarianMTModel,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from bidistill.errors import UserError
from bidistill.integrations.attach import attach, detach
from bidistill.models import transform_of_config
from bidistill_kernels import bidirectional_kl_reference
from examples.tiny import make_pairs
from tests.integrations.eager import assert_all_close, backward, batch, objective
from tests.support import Wide, assert_close

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    # its experts, a layer without positions, and one with a window shorter than its sequences
    "llama4": (
        Llama4TextConfig,
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 4,
        },
    ),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, {"final_logit_softcapping": 3.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, {"logits_scaling": 6.0}),
    "phi": (PhiConfig, {}),
    "recurrent_gemma": (RecurrentGemmaConfig, {"logits_soft_cap": 2.0, "lru_width": 32}),
    "gpt2": (GPT2Config, {}),
}
"""What the test sets beside the sizes: what each does to its logits."""
TRANSFORMS = {
    "gemma2": (1.0, 2.0),
    "gemma3": (1.0, 3.0),
    "cohere": (0.25, None),
    "granite": (1 / 6.0, None),
    "recurrent_gemma": (1.0, 2.0),
}


def make(family, tied, seed=0):
    kind, own = FAMILIES[family]
    sizes = GPT if family == "gpt2" else SIZES
    torch.manual_seed(seed)
    config = kind(**sizes, **own, tie_word_embeddings=tied)
    # gemma2's soft-cap inside attention is in the eager implementation alone
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def pairs():
    found = make_pairs(5)
    for pair in found:
        for ids in pair.values():
            ids[:] = [3 + i % (VOCABULARY - 3) for i in ids]
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_its_own_logits(family, tied):
    student, other = make(family, tied).double(), make(family, tied, seed=1).double()
    transform = transform_of_config(student.config)
    assert (transform.scale, transform.softcap) == TRANSFORMS.get(family, (1.0, None))
    attach(student, teacher=other)
    with Wide():
        plain = objective(student, other, bidirectional_kl_reference, pairs())
        eager = backward(student, plain)
        assert ("lm_head.bias" in eager) == (family == "phi")
        # what a recurrent state has read, padding included, no mask takes back
        for side in ("right",) if family == "recurrent_gemma" else ("right", "left"):
            ours = backward(student, student(**batch(side, pairs())).loss)
            assert_all_close(ours, eager, eager)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi"])
def test_the_early_check_takes_16_bits(family):
    model = attach(make(family, tied=False).bfloat16())
    assert model(**batch(pairs=pairs())).loss.isfinite()


STATES = {name: SIZES[name] for name in SIZES if "heads" not in name} | {"state_size": 8}
RECURRENT = {
    "mamba": MambaConfig(**STATES),
    "falcon_mamba": FalconMambaConfig(**STATES),
    "mamba2": Mamba2Config(**STATES, num_heads=4, expand=2, n_groups=1, chunk_size=8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", RECURRENT)
def test_a_residual_stream_of_32_bits(family, dtype):
    """Whatever the weights, theirs has 32, and a head of 16 bits is given it in its own.

    Their states amplify a rounding in 16 bits, so gradients are compared where the head alone is.
    """
    RECURRENT[family].tie_word_embeddings = False
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(RECURRENT[family]).eval())
        models[-1].lm_head.to(dtype)
    exact, eager = from_logits(models)
    attach(models[0], teacher=models[1])
    ours = backward(models[0], models[0](**batch(pairs=pairs())).loss)
    # no more exact than the head
    ours, eager = ({name: t.to(dtype) for name, t in each.items()} for each in (ours, eager))
    assert_all_close(ours, exact, eager)
    detach(models[0])
    for model in models:
        model.to(dtype)
    exact, eager = from_logits(models)
    attach(models[0], teacher=models[1])
    loss = models[0](**batch(pairs=pairs())).loss.to(dtype)
    assert_close("loss", loss, exact["loss"], eager["loss"].to(dtype))


def from_logits(models):
    """Loss and gradients from full logits: in fp64, and as the student and its teacher are."""
    wide = [copy.deepcopy(model).double() for model in models]
    with Wide():
        exact = backward(wide[0], objective(*wide, bidirectional_kl_reference, pairs()))
    return exact, backward(models[0], objective(*models, bidirectional_kl_reference, pairs()))


BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2}
UNFIT = {
    "T5ForConditionalGeneration": (
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        r"which is an encoder-decoder \(t5\)",
    ),
    "BartForConditionalGeneration": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        r"which is an encoder-decoder \(bart\)",
    ),
    "MarianMTModel": (
        lambda: MarianMTModel(MarianConfig(**BART, decoder_start_token_id=1)),
        r"which is an encoder-decoder \(marian\)",
    ),
    "ChameleonForConditionalGeneration": (
        lambda: ChameleonForConditionalGeneration(
            ChameleonConfig(
                **SIZES,
                vocabulary_map={"<image>": 4, "IMGIMGBS": 5},
                vq_config=ChameleonVQVAEConfig(
                    base_channels=32, num_embeddings=8, embed_dim=8, latent_channels=8
                ).to_dict(),
            )
        ),
        r"which masks the logits of its image tokens \(chameleon\)",
    ),
    "LlamaModel": (
        lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).model,
        r"which has no LM head \(llama\)",
    ),
    "MixtralForCausalLM": (
        lambda: AutoModelForCausalLM.from_config(
            MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True)
        ),
        r"with output_router_logits, whose auxiliary loss",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_refuses_by_name(name):
    make_model, message = UNFIT[name]
    with pytest.raises(UserError, match=f"model: got a {name}.*{message}") as caught:
        attach(make_model())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bart", BartConfig(**BART, is_decoder=True, is_encoder_decoder=False)),
        ("opt", OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    ],
)
def test_refuses_a_backbone_that_is_not_called(kind, config):
    """Their head is given what a part of the backbone returns: perhaps the same, perhaps not."""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"^model: got a {kind} model, whose LM head is given"):
        attach(model)


def test_a_bias_on_logits_is_refused_by_name():
    """Of BART-like models; where one has no encoder, the bias is what gives it away."""
    model = BartForCausalLM(BartConfig(**BART, is_decoder=True, is_encoder_decoder=False))
    model.register_buffer("final_logits_bias", torch.zeros(1, VOCABULARY))
    with pytest.raises(UserError, match=r"adds a final_logits_bias to its logits \(bart\)"):
        attach(model)

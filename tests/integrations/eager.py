"""The objectives from full logits, and the gradients that come of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bidistill.integrations.collator import PairCollator
from examples.tiny import answer_logits, make_pairs, tiny_llama
from tests.support import assert_close

PEFT_WARNINGS = [
    # peft 0.21 asks for a property that transformers 5.23 renames
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # an adapter on a head that is tied to the embedding
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


COMPILE_WARNINGS = [
    # torch 2.13's own, on its first compilation
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]


def nearby():
    """A model not far from `tiny_llama`, whose head is its own."""
    model = tiny_llama()
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(side="right", pairs=None):
    """All pairs in one padded batch."""
    return PairCollator(1, side)(pairs or make_pairs())


def with_lora(model=None, seed=0, **settings):
    """LoRA whose weights look as if training had gone on for a while."""
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(model or tiny_llama(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def objective(student, teacher, reference, pairs=None, transform=None, **options):
    """Mean of a loss's reference over the answers' logits; one sequence at a time, unpadded.

    `teacher` is a model, or a function that returns the teacher's logits of a pair.
    """
    rows, theirs, targets = [], [], []
    for pair in pairs or make_pairs():
        rows.append(answer_logits(student, pair["prompt_ids"], pair["answer_ids"]))
        with torch.no_grad():
            ask = teacher if not isinstance(teacher, torch.nn.Module) else asked(teacher)
            theirs.append(ask(pair))
        targets += pair["answer_ids"]
    return reference(torch.cat(rows), torch.cat(theirs), torch.tensor(targets), **options).mean()


def asked(model):
    """What a model without dropout gives for a pair, as its teacher."""

    def logits(pair):
        return answer_logits(model, pair["teacher_prompt_ids"], pair["answer_ids"])

    return logits


def backward(model, loss):
    """The loss, and the gradient of each trained parameter; none is left behind."""
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def assert_all_close(ours, expected64, eager):
    """Loss and gradients: errors at most twice those of PyTorch from full logits."""
    assert ours.keys() == expected64.keys() == eager.keys()
    for name, value in expected64.items():
        assert value.abs().max() > 1e-7, f"{name}: zero proves nothing"
        assert_close(name, ours[name], value, eager[name].to(ours[name].dtype))

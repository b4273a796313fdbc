"""What an attached model leaves as it was, and what it says when somebody changes it later."""

import copy
import functools
import hashlib
import io
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bidistill.errors import UserError
from bidistill.integrations.attach import STATE, attach, detach
from examples.tiny import tiny_llama
from tests.integrations.eager import (
    PEFT_WARNINGS,
    batch,
    nearby,
    with_lora,
)

pytestmark = PEFT_WARNINGS
IDS = torch.arange(2, 14)[None]


def files_of(model, folder):
    model.save_pretrained(folder)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_everything_else_is_the_models_own(tmp_path, adapted):
    model = with_lora() if adapted else tiny_llama()
    head = model.get_output_embeddings()
    before = dict(vars(model)), dict(vars(head))

    def everything(name):
        ids = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=True
        )
        torch.manual_seed(0)
        plain = model(input_ids=IDS, labels=IDS, num_items_in_batch=7)
        return ids, plain.loss, plain.logits, files_of(model, tmp_path / name)

    torch.manual_seed(0)
    expected = everything("before")
    random = torch.random.get_rng_state()
    assert attach(model) is model
    assert torch.equal(torch.random.get_rng_state(), random), "the early check draws nothing"
    for name in ("during", "after"):
        torch.manual_seed(0)
        found = everything(name)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
        assert found[3] == expected[3]
        if name == "during":
            model(**batch()).loss.backward()
            model.zero_grad()
            assert detach(model) is model
    for module, attributes in zip((model, head), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert "forward" not in vars(module)
        assert module.forward.__func__ is type(module).forward


def test_detach_gives_back_a_forward_of_the_instance():
    model = tiny_llama()
    calls = []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    attach(model)
    calls.clear()
    model(input_ids=IDS)
    assert len(calls) == 1, "without a teacher's part it is what is called"
    model(**batch())
    assert len(calls) == 1
    assert detach(model).forward is forward


def test_refuses_to_be_pickled():
    """It could be, but never be loaded."""
    model = attach(with_lora())
    for each in (model, model.get_base_model()):
        with pytest.raises(UserError, match=r"got a PeftModel.* to be pickled.*save_pretrained"):
            torch.save(each, io.BytesIO())
    torch.save(detach(model), io.BytesIO())


def test_a_copy_is_attached_by_itself():
    model = attach(tiny_llama())
    other = copy.deepcopy(model)
    expected = model(**batch()).loss
    torch.nn.init.zeros_(model.lm_head.weight)
    assert torch.equal(other(**batch()).loss, expected)
    detach(other)
    assert "forward" not in vars(other.lm_head)
    assert not other._forward_pre_hooks
    assert model._forward_pre_hooks
    with pytest.raises(UserError, match="no loss attached"):
        detach(other)
    assert model(**batch()).loss != expected


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_a_forward_that_somebody_replaces_is_noticed(adapted):
    """It would swallow the teacher's part and return a cross-entropy."""
    model = attach(with_lora() if adapted else tiny_llama())
    ours = model.forward

    @functools.wraps(ours)
    def around(*args, **kwargs):
        return ours(*args, **kwargs)

    for forward in (ours, around):
        model.forward = forward
        assert model(**batch()).logits is None
    model.forward = types.MethodType(type(model).forward, model)
    with pytest.raises(UserError, match=r"model\.forward: got another one.*use_liger_kernel") as e:
        model(**batch())
    assert "\n" not in str(e.value)
    assert model(input_ids=IDS).logits is not None, "an ordinary batch is nothing to refuse"
    detach(model)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_unwrapping_autocast_is_noticed():
    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer before, without bf16
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(attach(tiny_llama()))
    assert model(**batch()).logits is None
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with pytest.raises(UserError, match=r"got another one.*keep_fp32_wrapper=True"):
        model(**batch())
    assert attach(detach(model))(**batch()).logits is None


def test_refuses_replicas_of_data_parallel():
    """Their forward is bound to the model that they are copies of."""
    replica = attach(tiny_llama())._replicate_for_data_parallel()
    with pytest.raises(UserError, match=r"a replica of nn.DataParallel.*torchrun"):
        replica(input_ids=IDS)


def watch_output(model):
    return model.lm_head.register_forward_hook(lambda *given: 2 * given[-1])


def watch_input(model):
    return model.lm_head.register_forward_pre_hook(lambda *given: None)


@pytest.mark.parametrize("watch", [watch_output, watch_input])
def test_hooks_at_an_lm_head_are_refused(watch):
    """One that looks for logits would be given the loss."""
    models = {"model": tiny_llama(), "teacher": nearby()}
    for name, model in models.items():
        handle = watch(model)
        with pytest.raises(UserError, match=rf"^{name}: got an LM head with a forward hook"):
            attach(models["model"], teacher=models["teacher"])
        handle.remove()
    student = attach(models["model"], teacher=models["teacher"])
    expected = student(**batch()).loss
    for name, model in models.items():
        handle = watch(model)
        with pytest.raises(UserError, match=rf"^{name}: .* \(watch_\w+\.<locals>.*none; rem") as e:
            student(**batch())
        assert "\n" not in str(e.value)
        handle.remove()
    assert torch.equal(student(**batch()).loss, expected)


@pytest.mark.usefixtures("alone")
def test_hooks_of_fsdp_at_an_lm_head_stay():
    student = attach(tiny_llama(tied=False))
    expected = student(**batch()).loss
    mesh = init_device_mesh("cpu", (1,))
    for each in (student.lm_head, student):  # the head in a unit of its own
        fully_shard(each, mesh=mesh)
    assert student.lm_head._forward_hooks
    assert student.lm_head._forward_pre_hooks
    torch.testing.assert_close(student(**batch()).loss, expected)


@pytest.mark.parametrize("whose", ["model", "teacher"])
def test_a_vocabulary_that_is_resized_is_noticed(whose):
    """Of a tied head the module stays the same."""
    models = {"model": tiny_llama(), "teacher": tiny_llama(seed=1)}
    student = attach(models["model"], teacher=models["teacher"])
    head = models[whose].get_output_embeddings()
    models[whose].resize_token_embeddings(4160, mean_resizing=False)
    assert models[whose].get_output_embeddings() is head
    with pytest.raises(UserError, match=rf"^{whose}: got another LM head .*is resized"):
        student(**batch())


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "within"])
def test_the_model_within_is_detached_as_well(merged):
    model = attach(with_lora())
    base = model.merge_and_unload() if merged else model.get_base_model()
    with pytest.raises(UserError, match="attached to it already"):
        attach(base)
    said = r"^model: got the LlamaForCausalLM within the PeftModel.*merge_and_unload"
    with pytest.raises(UserError, match=said):
        base(**batch())
    assert detach(base) is base
    for each in (model, base):
        assert vars(each).keys().isdisjoint({"forward", STATE})
        with pytest.raises(UserError, match="no loss attached"):
            detach(each)
    assert attach(base)(**batch()).logits is None

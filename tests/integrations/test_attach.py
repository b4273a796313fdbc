"""An attached model gives the loss and the gradients of full logits, and is otherwise untouched."""

import copy
import functools
import hashlib
import io
import types
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel

from bidistill.errors import UserError
from bidistill.integrations.attach import STATE, attach, detach
from bidistill.losses import Loss
from bidistill.models import own_rows
from bidistill_kernels import (
    TopK,
    bidirectional_kl_reference,
    bild_reference,
    jsd_reference,
    linear_bidirectional_kl,
    push_pull_reference,
    topk_kl_reference,
)
from examples.tiny import make_pairs, tiny_llama
from tests.integrations.eager import (
    COMPILE_WARNINGS,
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

pytestmark = [*PEFT_WARNINGS, *COMPILE_WARNINGS]
IDS = torch.arange(2, 14)[None]


def case(teacher):
    """A student and the model that the references take for its teacher."""
    if teacher == "base":
        return with_lora(), tiny_llama()
    student = tiny_llama()
    return student, student if teacher == "live" else nearby()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", ["base", "live", "other"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_full_logits(dtype, teacher, side):
    student, reads = (model.to(dtype) for model in case(teacher))
    attach(student, teacher=reads if teacher == "other" else teacher)
    with Wide() if dtype is torch.float64 else nullcontext():
        ours = backward(student, student(**batch(side)).loss)
        eager = backward(student, objective(student, reads, bidirectional_kl_reference))
    student, reads = (model.to(dtype).double() for model in case(teacher))
    with Wide():
        exact = backward(student, objective(student, reads, bidirectional_kl_reference))
    assert_all_close(ours, exact, eager)


def topk_reference(student, teacher, target, k):
    best = teacher.log_softmax(-1).topk(k)
    return topk_kl_reference(student, TopK(best.indices, best.values), target)


def duet_reference(student, teacher, target, k):
    return push_pull_reference(student, teacher, target, k_pull=k, push_weight=0.0)


@pytest.mark.parametrize(
    ("loss", "reference", "options"),
    [
        ("bidirectional_kl", bidirectional_kl_reference, {"forward": 1.0, "cross_entropy": 0.2}),
        ("jsd", jsd_reference, {"beta": 0.3}),
        ("bild", bild_reference, {"k": 5}),
        ("push_pull", push_pull_reference, {"k_pull": 4, "margin": 0.1}),
        ("topk_kl", topk_reference, {"k": 6}),
        ("duet", duet_reference, {"k": 3}),
    ],
)
def test_other_losses_and_their_options(loss, reference, options):
    student, other = tiny_llama().double(), tiny_llama(seed=1).double()
    attach(student, loss, teacher=other, options=options)
    with Wide():
        ours = backward(student, student(**batch()).loss)
        eager = backward(student, objective(student, other, reference, **options))
    assert_all_close(ours, eager, eager)


def test_chunk_bytes_reach_the_kernels(monkeypatch):
    chunk_bytes = 3 * 8 * 4096  # three rows of logits
    given = []

    def spy(*args, **keywords):
        given.append(keywords["chunk_bytes"])
        return linear_bidirectional_kl(*args, **keywords)

    monkeypatch.setattr("bidistill.integrations.attach.find", lambda name: Loss(spy))
    student, other = tiny_llama().double(), nearby().double()
    attach(student, teacher=other, chunk_bytes=chunk_bytes)
    with Wide():
        ours = backward(student, student(**batch()).loss)
        eager = backward(student, objective(student, other, bidirectional_kl_reference))
    assert given == [chunk_bytes]
    assert_all_close(ours, eager, eager)


def test_temperature_divides_the_logits_of_both():
    def warm(student, teacher, target):
        return bidirectional_kl_reference(student / 2, teacher / 2, target)

    student, other = tiny_llama().double(), tiny_llama(seed=1).double()
    attach(student, teacher=other, temperature=2.0)
    with Wide():
        eager = backward(student, objective(student, other, warm))
        assert_all_close(backward(student, student(**batch()).loss), eager, eager)


def test_divides_by_the_items_that_it_is_told():
    student = attach(tiny_llama().double())
    inputs = batch()
    count = (inputs["labels"] != -100).sum()
    mean = student(**inputs).loss
    for items in (3 * count, 3 * int(count)):
        torch.testing.assert_close(student(**inputs, num_items_in_batch=items).loss, mean / 3)
    del inputs["shift_labels"]
    torch.testing.assert_close(student(**inputs).loss, mean, rtol=0, atol=0)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["teacher_labels"] = torch.full_like(inputs["teacher_labels"], -100)
    for items in (None, 0, torch.tensor(0)):
        nothing = student(**inputs, num_items_in_batch=items).loss
        nothing.backward()
        assert nothing.item() == 0, "a batch without answers is worth nothing, and no NaN"


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


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "within"])
def test_the_model_within_is_detached_as_well(merged):
    model = attach(with_lora())
    base = model.merge_and_unload() if merged else model.get_base_model()
    with pytest.raises(UserError, match="attached to it already"):
        attach(base)
    with pytest.raises(UserError, match=r"model\.forward: got another one"):
        base(**batch())
    assert detach(base) is base
    for each in (model, base):
        assert vars(each).keys().isdisjoint({"forward", STATE})
        with pytest.raises(UserError, match="no loss attached"):
            detach(each)
    assert attach(base)(**batch()).logits is None


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


def test_refuses_a_second_loss_and_other_modules():
    model = attach(with_lora())
    for twice in (model, model.get_base_model()):
        with pytest.raises(UserError, match=r"attached to it already.*call detach"):
            attach(twice)
    with pytest.raises(UserError, match=r"got a Linear, expected a causal language model"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"got a OptimizedModule.*before it is compiled"):
        attach(torch.compile(tiny_llama()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "npo"}, r"loss: got 'npo', which does not compare LM heads .*bidirectional_kl"),
        ({"loss": "cross_entropy"}, r"loss: got 'cross_entropy', which does not compare"),
        ({"loss": "jds"}, r"loss: got 'jds'.*did you mean 'jsd'"),
        ({"options": {"beta": 1}}, r"options: got 'beta', which is no option of bidirectional_kl"),
        ({"loss": "jsd", "options": {"beta": 2}}, r"options: beta: got 2, expected"),
        ({"teacher": "ema"}, r"teacher: got 'ema', expected one of 'auto', 'base', 'live'"),
        ({"teacher": "base"}, r"teacher: got 'base' for a model without adapters"),
        ({"temperature": 0}, r"temperature: got 0, expected a finite number above 0"),
    ],
)
def test_refuses_arguments(arguments, message):
    model = tiny_llama()
    before = dict(vars(model))
    with pytest.raises(UserError, match=message) as caught:
        attach(model, **arguments)
    assert "\n" not in str(caught.value)
    assert vars(model) == before, "a refusal leaves no trace"


def test_refuses_itself_as_another_teacher():
    model = tiny_llama()
    with pytest.raises(UserError, match=r"teacher: got the model itself.*pass teacher='live'"):
        attach(model, teacher=model)


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


def test_refuses_batches():
    model = attach(tiny_llama())
    for key in ("labels", "teacher_labels"):
        inputs = batch()
        inputs.pop("shift_labels", None)
        del inputs[key]
        with pytest.raises(UserError, match=rf"^{key}: got none beside teacher_input_ids"):
            model(**inputs)
    inputs = batch()
    inputs["teacher_labels"] = inputs["teacher_labels"].roll(1, dims=0)
    with pytest.raises(RuntimeError, match="teacher_labels: got other answer tokens"):
        model(**inputs)


def test_unequal_lengths_line_up():
    """A teacher whose prompt is far longer, and one that reads less than the student."""
    pairs = make_pairs(3)
    pairs[0]["teacher_prompt_ids"] = list(range(2, 40))
    pairs[1]["prompt_ids"], pairs[1]["teacher_prompt_ids"] = list(range(2, 50)), [5]
    model, other = tiny_llama().double(), tiny_llama(seed=1).double()
    attach(model, teacher=other)
    for some in (pairs, pairs[:1], pairs[1:2]):
        with Wide():
            eager = backward(model, objective(model, other, bidirectional_kl_reference, some))
            assert_all_close(backward(model, model(**batch(pairs=some)).loss), eager, eager)

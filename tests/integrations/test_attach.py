"""An attached model gives the loss and the gradients of full logits."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaForCausalLM

from bidistill.errors import UserError
from bidistill.integrations.attach import attach
from bidistill.losses import Loss
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
    assert_all_close,
    backward,
    batch,
    nearby,
    objective,
    with_lora,
)
from tests.support import Wide

pytestmark = [*PEFT_WARNINGS, *COMPILE_WARNINGS]


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


def test_divides_by_a_share_of_an_item():
    """Such as the count over the number of ranks."""
    student = attach(tiny_llama().double())
    inputs = batch()
    count = (inputs["labels"] != -100).sum()
    expected = student(**inputs).loss * count / 0.25
    for items in (0.25, torch.tensor(0.25)):
        torch.testing.assert_close(student(**inputs, num_items_in_batch=items).loss, expected)


def test_refuses_a_second_loss_and_other_modules():
    model = attach(with_lora())
    for twice in (model, model.get_base_model()):
        with pytest.raises(UserError, match=r"attached to it already.*call detach"):
            attach(twice)
    with pytest.raises(UserError, match=r"got a Linear, expected a causal language model"):
        attach(torch.nn.Linear(2, 2))
    for other, said in (("gpt2", "str"), (None, "NoneType")):
        with pytest.raises(UserError, match=rf"model: got a {said}, expected a causal language"):
            attach(other)
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
        ({"temperature": "x"}, r"temperature: got 'x', expected a finite number above 0"),
        ({"loss": None}, r"loss: got None, expected the name of a loss; use one of: "),
        ({"options": [1]}, r"options: got \[1\], expected .* by name; pass a dictionary"),
        ({"teacher": []}, r"teacher: got \[\], expected one of 'auto'"),
        ({"chunk_bytes": 0}, r"chunk_bytes: got 0, expected a whole number of bytes above 0"),
        ({"chunk_bytes": "x"}, r"chunk_bytes: got 'x', expected a whole number"),
    ],
)
def test_refuses_arguments(arguments, message):
    model = tiny_llama()
    before = dict(vars(model))
    with pytest.raises(UserError, match=message) as caught:
        attach(model, **arguments)
    assert "\n" not in str(caught.value)
    assert vars(model) == before, "a refusal leaves no trace"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_input_ids": None}, r"^teacher_\w+: got it in a batch without teacher_input_ids"),
        ({"adapter_names": ["a"] * 8}, r"^adapter_names: got them beside teacher_input_ids"),
        (
            {"teacher_input_ids": torch.ones(7, 9).long()},
            "^teacher_input_ids: got 7 .* 8,",
        ),
    ],
    ids=["half of a teacher", "adapter names", "fewer rows"],
)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_refuses_parts_of_batches(change, message, adapted):
    model = attach(with_lora() if adapted else tiny_llama())
    with pytest.raises(UserError, match=message) as caught:
        model(**batch() | change)
    assert "\n" not in str(caught.value)


def test_takes_ids_and_mask_by_position_and_no_more():
    model = attach(tiny_llama(), teacher=nearby())
    inputs = batch()
    expected = model(**inputs).loss
    given = [inputs.pop(name) for name in ("input_ids", "attention_mask")]
    assert torch.equal(model(*given, **inputs).loss, expected)
    with pytest.raises(UserError, match=r"^model: got 3 arguments by position .*by keyword"):
        model(*given, None, **inputs)


def test_refuses_a_model_without_weights():
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UserError, match=r"^model: got a LlamaForCausalLM with .* meta device"):
        attach(empty)
    with pytest.raises(UserError, match=r"^teacher: got a LlamaForCausalLM with .* meta device"):
        attach(tiny_llama(), teacher=empty)


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

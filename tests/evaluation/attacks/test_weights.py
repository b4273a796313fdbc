"""Attacks on the weights: they do what they say, count what they should, and leave no trace."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from bidistill.errors import UserError
from bidistill.evaluation.attacks import attack, relearn
from bidistill.evaluation.attacks.logit_lens import read_layers
from bidistill.evaluation.attacks.low_rank import linear_layers, low_rank
from bidistill.evaluation.attacks.quantise import GRIDS, Grid, quantised, rounded
from bidistill.evaluation.attacks.relearn import STEPS, split
from tests.evaluation.attacks.invented import CAPITALS, FORGET, PROBES


@pytest.fixture(params=["plain", "adapter", "bfloat16"])
def any_model(request, model):
    if request.param == "adapter":
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(model, config)
    return model.bfloat16() if request.param == "bfloat16" else model


def state(model):
    """Everything that an attack could have changed.

    All but what transformers itself hangs on a model when it is asked for hidden states.
    """
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = {name: len(module._forward_hooks) for name, module in linear}
    return tensors, flags, hooks, model.training


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("name", ["relearn", "quantise", "logit_lens"])
def test_the_model_is_restored_bit_for_bit(any_model, tokenizer, name):
    before = state(any_model)
    attack(any_model, tokenizer, PROBES, [name], max_new_tokens=2)
    after = state(any_model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


@pytest.mark.parametrize(
    "context", [lambda m: low_rank(m, 2, 0), lambda m: quantised(m, Grid(4, 8))]
)
def test_the_model_is_restored_after_an_error(model, context):
    before = state(model)
    with pytest.raises(KeyboardInterrupt), context(model):
        raise KeyboardInterrupt
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


def test_relearn_trains_on_one_half_and_asks_for_the_other(model, tokenizer):
    read = []

    def look(module, args, kwargs):
        if torch.is_grad_enabled():
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            read.append([tokenizer.decode(ids[mask.bool()]) for ids, mask in rows])

    model.register_forward_pre_hook(look, with_kwargs=True)
    summary, items = attack(model, tokenizer, PROBES, ["relearn"], max_new_tokens=4)
    found = summary["attacks"]["relearn"]
    train, measure = (found[key] for key in ("trained_on", "measured_on"))
    assert {*train} | {*measure} == {probe.id for probe in FORGET}
    assert not {*train} & {*measure}
    assert (len(train), len(measure)) == (1, 2)
    assert {item["id"] for item in items} == {*measure}
    places = {place.lower(): (place, capital) for place, capital in CAPITALS.items()}
    assert len(read) == max(STEPS)
    for texts in read:
        assert len(texts) == len(train)
        for text, key in zip(texts, train, strict=True):
            assert text.endswith(f"is {places[key][1]}.</s>")
        assert not any(word in text for text in texts for key in measure for word in places[key])
    assert found["loss"][-1] < 0.7 * found["loss"][0], "the steps should train"
    assert list(found["by"]) == ["untouched", *(f"{step} steps" for step in STEPS)]
    assert {rate["n"] for rate in found["by"].values()} == {2}


def test_relearn_loss_is_that_of_the_answers_alone(model, tokenizer):
    """Against the model's own log-probabilities, one unpadded row at a time."""
    from bidistill.data.records import Record
    from bidistill.data.views import build_examples

    model = model.double().eval()
    records = [Record(id=p.id, role="gold", question=p.question, answer=p.answer) for p in FORGET]
    examples = build_examples(records, tokenizer, {})
    nats, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([[*example.student.prompt_ids, *example.answer_ids]])
        answer = ids[0, len(example.student.prompt_ids) :]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        nats -= log_probs.gather(1, answer[:, None]).sum().item()
        tokens += len(answer)
    loss = relearn._loss(model, examples)
    assert loss.item() == pytest.approx(nats / tokens, rel=1e-5)


def test_the_curve_and_the_steps_to_half(monkeypatch, model, tokenizer):
    """A model that tells the first fact of V after 2 steps and the second after 8."""
    _, measure = split(FORGET, 0)
    since = {measure[0].id: 2, measure[1].id: 8}
    steps = iter([0, *STEPS])

    def asked(model, setting, probes, name):
        step = next(steps)
        blank = dict.fromkeys(("refusal", "empty", "gibberish"), False)
        return [{"id": p.id, "attempt": name, "leak": since[p.id] <= step, **blank} for p in probes]

    monkeypatch.setattr(relearn, "_ask", asked)
    summary, _ = attack(model, tokenizer, PROBES, ["relearn"])
    found = summary["attacks"]["relearn"]
    assert [rate["leak"] for rate in found["by"].values()] == [0, 0, 0.5, 0.5, 1, 1]
    assert (found["steps_to_half"], found["leak"], found["n"]) == (2, 1, 2)


def test_what_leaks_untouched_is_not_the_attacks_doing(monkeypatch, model, tokenizer):
    blank = dict.fromkeys(("refusal", "empty", "gibberish"), False)
    monkeypatch.setattr(
        relearn,
        "_ask",
        lambda model, setting, probes, name: [
            {"id": p.id, "attempt": name, "leak": name == "untouched", **blank} for p in probes
        ],
    )
    found = attack(model, tokenizer, PROBES, ["relearn"])[0]["attacks"]["relearn"]
    assert found["by"]["untouched"]["leak"] == 1
    assert (found["leak"], found["attempts"], found["steps_to_half"]) == (0, 2 * len(STEPS), 0)


def test_one_probe_cannot_be_relearnt_from_another(model, tokenizer):
    summary, items = attack(model, tokenizer, FORGET[:1], ["relearn"])
    found = summary["attacks"]["relearn"]
    assert (found["n"], found["leak"], found["steps_to_half"], items) == (0, None, None, [])


def test_low_rank_starts_as_no_change_and_reaches_every_layer(model, tokenizer):
    ids = torch.tensor([tokenizer("Why?").input_ids])
    plain = model(input_ids=ids).logits
    with low_rank(model, 4, 0) as parameters:
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert len(parameters) == 2 * len(linear_layers(model)) == 2 * 3 * 7
        for parameter in parameters:
            nn.init.constant_(parameter, 0.01)
        changed = model(input_ids=ids).logits
        gradients = torch.autograd.grad(changed.square().sum(), parameters)
        assert all(gradient.any() for gradient in gradients)
    assert not torch.allclose(changed, plain)
    assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_rounding_error_is_at_most_half_a_step(name, bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 150) * torch.tensor([1e-4, 1.0, 1e3, 1.0, 0.0, 1.0])[:, None]
    grid = GRIDS[name]
    assert grid.bits == bits
    result = rounded(weight, grid)
    assert result.shape == weight.shape
    width = grid.group or weight.shape[1]
    for start in range(0, weight.shape[1], width):
        part, given = result[:, start : start + width], weight[:, start : start + width]
        most = given.abs().amax(1)
        error = (part - given).abs().amax(1)
        bound = most / (2**bits - 2)
        assert (error <= bound * 1.0001).all()
        assert (error[most > 0] > bound[most > 0] / 4).all(), "nothing was rounded"
        levels = [len(row.unique()) for row in part]
        assert max(levels) <= 2**bits - 1


def test_quantised_rounds_the_linear_layers_and_neither_head_nor_embedding(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with quantised(model, Grid(4, 8)):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    for name in changed:
        assert torch.equal(inside[name], rounded(before[name], Grid(4, 8)))


def test_quantise_reports_the_difference_to_the_untouched_model(model, tokenizer):
    summary, items = attack(model, tokenizer, PROBES, ["quantise"], max_new_tokens=4)
    found = summary["attacks"]["quantise"]
    assert list(found["by"]) == ["untouched", "int8", "int4"]
    assert found["delta"].keys() == GRIDS.keys()
    assert (found["n"], found["attempts"]) == (3, 6)
    said = {
        name: [i["continuation"] for i in items if i["attempt"] == name] for name in found["by"]
    }
    assert said["int4"] != said["untouched"]


def gemma(vocab):
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
        final_logit_softcapping=3.0,
    )
    return Gemma2ForCausalLM(config)


def gpt2(vocab):
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2))


@pytest.mark.parametrize("build", [None, gemma, gpt2], ids=["llama", "gemma2", "gpt2"])
def test_the_last_layer_of_the_lens_is_the_model_itself(build, model, tokenizer):
    model = (build(len(tokenizer)) if build else model).double().eval()
    prompts = [tokenizer(text).input_ids for text in ("The capital", "x", "It is so")]
    tokens = [5, 70, 200]
    log_probs, ranks = read_layers(model, prompts, tokens)
    layers = model.config.num_hidden_layers
    assert log_probs.shape == ranks.shape == (layers + 1, 3)
    for row, (ids, token) in enumerate(zip(prompts, tokens, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        own = logits.log_softmax(-1)[token].item()
        assert log_probs[-1, row].item() == pytest.approx(own, rel=1e-5)
        assert ranks[-1, row] == 1 + (logits > logits[token]).sum()
    assert not torch.allclose(log_probs[0], log_probs[-1])


def test_the_lens_looks_right_before_the_fact(model, tokenizer):
    summary, items = attack(model, tokenizer, PROBES, ["logit_lens"])
    assert [item["token"] for item in items] == ["O", "M", "G"]
    assert items[0]["prompt"].endswith("<s>assistant\nThe capital of Zembla is ")
    found = summary["attacks"]["logit_lens"]
    assert (found["n"], found["refusal"]) == (3, None)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for number, layer in enumerate(found["layers"]):
        ranks = [item["ranks"][number] for item in items]
        assert layer["mean_rank"] == sum(ranks) / 3
        assert layer["leak"] == ranks.count(1) / 3
        assert layer["mean_log_prob"] == sum(item["log_probs"][number] for item in items) / 3
    for item in items:
        assert item["leak"] == (1 in item["ranks"]) == (item["layer"] is not None)


def test_the_lens_finds_what_a_middle_layer_knows(model, tokenizer):
    """A model whose second layer turns everything into one letter, and whose third undoes it."""
    letter = tokenizer("O").input_ids[0]
    direction = 100 * model.lm_head.weight[letter].detach()
    model.model.layers[1].register_forward_hook(lambda m, args, out: out + direction)
    model.model.layers[2].register_forward_hook(lambda m, args, out: out - 2 * direction)
    summary, items = attack(model, tokenizer, FORGET[:1], ["logit_lens"])
    assert items[0]["ranks"][2] == 1
    assert items[0]["ranks"][3] > 1
    assert (items[0]["layer"], items[0]["leak"]) == (2, True)
    assert summary["attacks"]["logit_lens"]["leak"] == 1


def test_layers_of_another_kind_are_refused(tokenizer):
    model = gpt2(len(tokenizer))
    with pytest.raises(UserError, match="model: got one without linear layers"):
        attack(model, tokenizer, PROBES, ["quantise"], max_new_tokens=1)

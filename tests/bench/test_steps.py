"""Whole steps: the loss is that of the definition, a wrong gradient gets no time, and nobody leaves
the weights other than they were.

The model is tiny and random; its loss computed plainly, a sequence at a time with whole logits,
says what the packed step should give.
"""

import json

import pytest
import torch

from bench import bench_steps, steps
from bench.cases import rows_of
from bench.divergences import LOSS, Exchanged, Provider, exact, providers
from bench.meter import Budget, DryMeter
from bench.steps import Setup, StepCase
from bidistill.errors import UserError
from bidistill.models import adapters_off

CPU = torch.device("cpu")
CONFIGS = ("lora", "full")


class Clock(DryMeter):
    """A clock and scales that show the same always."""

    dry, turns = False, 1

    def samples_ms(self, step, about_ms=None):
        step()
        return [1.0, 2.0, 3.0]

    def peak_bytes(self, step):
        step()
        return 7


def case(config) -> StepCase:
    return StepCase(config, 2, 24, model="tiny")


def measure(config, everybody=None):
    records = steps.measure(case(config), Clock(), Budget(60), everybody)
    json.dumps(records, allow_nan=False)
    return {record["provider"]: record for record in records}


def kl(x, w, y, v, _):
    return rows_of("bidirectional_kl", x @ w.T, y @ v.T, None).mean()


def provider(name, divergence, loss=LOSS):
    return Provider(name, loss, lambda: Exchanged(divergence))


@pytest.mark.parametrize("config", CONFIGS)
def test_everybody_is_right_or_absent(config):
    records = measure(config)
    assert list(records) == ["bidistill", "eager", "trl, beta 0", "liger chunked, beta 0.5"]
    for name, record in records.items():
        if name in ("bidistill", "eager") or record["status"] != "not installed":
            assert record["status"] == "right", record
    ours = records["bidistill"]
    assert ours["kind"] == "step"
    assert (ours["config"], ours["model"], ours["dtype"]) == (
        config,
        "tiny, random weights",
        "float32",
    )
    assert (ours["tokens"], ours["sequence_tokens"]) == (24, 48)
    assert ours["samples_ms"] == [1, 2, 3]
    assert ours["median_ms"] == 2
    assert ours["p20_ms"] < 2 < ours["p80_ms"]
    assert ours["tokens_per_s"] == 24_000
    assert ours["peak_bytes"] == 7
    assert 0 <= ours["error_loss"] < 1e-5
    assert 0 < ours["error_gradient"] < 1e-4
    assert ours["state_bytes"] > 4 * 64 * 1000
    assert "computes" not in ours
    assert records["trl, beta 0"]["computes"] == "forward_kl"
    assert len({frozenset(r) - {"computes", "error"} for r in records.values()}) == 1, "keys differ"


@pytest.mark.parametrize("config", CONFIGS)
def test_sixteen_bits_are_right_too(config):
    half = case(config)._replace(dtype="bfloat16")
    with_fp32 = {"bidistill", "eager, fp32 logits"}
    everybody = [p for p in providers("bfloat16", "cpu") if p.name in with_fp32]
    for record in steps.measure(half, Clock(), Budget(60), everybody):
        with_fp32.remove(record["provider"])
        assert record["status"] == "right", record
        assert record["error_gradient"] < 2e-3
    assert not with_fp32


def scaled(*args):
    """The right loss, a gradient that is 20 % too large."""
    loss = kl(*args)
    return loss.detach() + 1.2 * (loss - loss.detach())


def without_head(x, w, y, v, target):
    return kl(x, w.detach(), y, v, target)


def broken(*args):
    raise RuntimeError("does not run here")


@pytest.mark.parametrize("config", CONFIGS)
def test_wrong_gradient_gets_no_time(config):
    records = measure(
        config,
        [
            provider("scaled", scaled),
            provider("right loss of another name", kl, "jsd"),
            provider("NaN", lambda *args: kl(*args) * torch.nan),
            provider("broken", broken),
            Provider("missing", LOSS, lambda: __import__("not_a_package")),
            provider("headless", without_head),
            provider("right", kl),
        ],
    )
    wrong = ["wrong gradient"] * 3 + ["failed", "not installed"]
    headless = "right" if config == "lora" else "wrong gradient"
    assert [r["status"] for r in records.values()] == [*wrong, headless, "right"]
    assert records["scaled"]["error_loss"] < 1e-5
    assert records["scaled"]["error_gradient"] == pytest.approx(0.2, abs=1e-3)
    assert records["NaN"]["error_gradient"] == "nan"
    assert "does not run here" in records["broken"]["error"]
    for record in records.values():
        timed = record["status"] == "right"
        assert bool(record["samples_ms"]) == timed
        assert (record["tokens_per_s"] is not None) == timed
        assert (record["peak_bytes"] is not None) == timed


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_stay_for_the_next(config):
    setup = Setup(case(config), CPU)
    before = [p.clone() for model in setup.models for p in model.parameters()]
    first = setup.run(Exchanged(kl)).loss
    for other in (scaled, without_head, lambda *args: kl(*args) * torch.nan):
        setup.run(Exchanged(other))
    assert setup.run(Exchanged(kl)).loss == first
    after = [p for model in setup.models for p in model.parameters()]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_step_is_the_definition(config):
    setup = Setup(case(config), CPU)
    total, rows = 0.0, 0
    for example in setup.batch.examples:
        student = logits(setup.model, example.student, example.answer_ids)
        if config == "lora":
            with adapters_off(setup.model):
                teacher = logits(setup.model, example.teacher, example.answer_ids)
        else:
            teacher = logits(setup.teacher.model, example.teacher, example.answer_ids)
        total += rows_of("bidirectional_kl", student, teacher, None).sum().item()
        rows += len(student)
    assert total / rows > 1e-3, "student and teacher are the same"
    with torch.enable_grad():
        found = setup.run(exact("bidirectional_kl"))
    assert found.loss == pytest.approx(total / rows, rel=1e-4)


def logits(model, view, answer):
    """Logits of the rows that predict the answer, fp64 (N, V)."""
    ids = torch.tensor([[*view.prompt_ids, *answer[:-1]]])
    return model(input_ids=ids, use_cache=False).logits[0, -len(answer) :].double()


def test_half_of_the_tokens_are_answers():
    batch = steps.make_batch(StepCase("lora", 3, 32), 50)
    for packed, tokens in ((batch.student(), 3 * 32), (batch.teacher(), 3 * 32 + 64)):
        assert packed.input_ids.numel() == pytest.approx(tokens, abs=3)  # a token may be shared
        assert len(packed.rows) == 3 * 16
    assert [e.role for e in batch.examples] == ["forget", "retain", "forget"]


def test_random_weights_say_so(monkeypatch):
    def absent():
        raise UserError("not installed")

    small = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setattr(steps.pretrained, "smollm2", absent)
    monkeypatch.setattr(steps.pretrained, "CONFIG", steps.pretrained.CONFIG | small | heads)
    first, second = (steps.smollm2(torch.bfloat16) for _ in range(2))
    assert first.name.startswith("random weights")
    assert first.model.dtype == torch.bfloat16
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pairs(device):
    found = list(bench_steps.pairs(device, tiny=False))
    assert len({p.id for p in found}) == len(found)
    assert {p.values[0].config for p in found} == set(CONFIGS)
    quick = {p.values[0] for p in found if p.marks}
    assert quick == {bench_steps.QUICK[device]}
    for chosen in {p.values[0] for p in found}:
        names = [p.values[1] for p in found if p.values[0] == chosen]
        assert names == [p.name for p in providers(chosen.dtype, device)]

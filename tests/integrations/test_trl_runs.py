"""Training by TRL's own loop, with our losses and with its own: the same weights after it.

On two processes, in pieces, and with what people switch on. TRL recomputes activations unless told
otherwise, so all of these do.
"""

import importlib
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch

from examples.tiny import tiny_llama

pytest.importorskip("trl", reason="trl is not installed")
from tests.integrations import trl_run
from tests.integrations.trl_run import Case, fit

pytestmark = [
    # trl 1.16 asks transformers 5.23 and peft 0.21 for what they have renamed since
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # it says so of all of trl.experimental
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
CLOSE = 1e-4
"""Of fp32 over a few updates: sums are taken in another order."""
EMA = {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "max_steps": 3}
CASES = {
    "distillation": Case("distillation", {"beta": 0.3}),
    "distillation of an adapter": Case("distillation", {}, adapter=True),
    "sdft, base": Case("sdft", {}),
    "sdft, adapters off": Case("sdft", {}, adapter=True),
    "sdft, ema": Case("sdft", EMA),
    "sdft, ema of an adapter": Case("sdft", EMA, adapter=True),
    # a batch that is used twice, the second time with ratios beyond the bound
    "sdft, clipped": Case("sdft", {"num_iterations": 2, "distillation_is_clip": 1.01}),
    "sdft, sampled": Case("sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 1}),
    "sdft, top ids": Case("sdft", {"distillation_mode": "topk_logits", "distillation_topk": 5}),
}


def assert_same(found, expected, logged=("loss",)):
    for line, other in zip(found.log, expected.log, strict=True):
        assert {key: line[key] for key in logged} == pytest.approx(
            {key: other[key] for key in logged}, rel=CLOSE
        )
    assert found.moved.keys() == expected.moved.keys()
    for name, moved in expected.moved.items():
        assert moved.any(), name
        assert (found.moved[name] - moved).norm() <= CLOSE * moved.norm(), name


@cache
def in_one_piece(name):
    """By TRL's own class."""
    return fit(CASES[name]._replace(own=True))


def metrics(name):
    """What is logged, if batches are cut alike."""
    return "loss", "entropy" if CASES[name].name == "distillation" else "sdft/distillation_loss"


@pytest.mark.parametrize("name", CASES)
def test_in_one_piece_and_in_two(name):
    """Two by gradient_accumulation_steps."""
    case, whole = CASES[name], in_one_piece(name)
    assert_same(fit(case), whole, metrics(name))
    found, expected = (fit(case._replace(own=own, accumulate=2)) for own in (False, True))
    assert_same(found, expected, metrics(name))
    assert_same(found, whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a teacher is loaded from."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name, ranks, saved):
    """By DDP, on answers of unlike lengths; TRL's own gives what one process gives."""
    case = CASES[name]._replace(accumulate=2)
    own = ranks.run(fit, case._replace(own=True), saved)
    outcomes = ranks.run(fit, case, saved)
    assert outcomes[0].tokens != outcomes[1].tokens
    for found, expected in zip(outcomes, own, strict=True):
        assert_same(found, expected, metrics(name))
        assert_same(found, in_one_piece(name))


def test_a_rank_on_which_nothing_counts(ranks, saved):
    """TRL's own would wait for ever: it does not gather what it logs there."""
    first, last = ranks.run(trl_run.fit_with_nothing_on_the_last_rank, CASES["sdft, base"], saved)
    assert_same(first, last)


LIGER = {"rope": False, "rms_norm": False, "swiglu": False}  # the loss alone: it runs on a CPU
SWITCHES = {
    "activations kept": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "liger": {"use_liger_kernel": True, "liger_kernel_config": LIGER},
}


# the teacher, without gradients, which is recomputed as well
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["distillation of an adapter", "sdft, adapters off"])
def test_what_changes_no_number(name, switch):
    if switch == "liger":
        pytest.importorskip("liger_kernel", reason="needs Liger")
    case = CASES[name]
    assert_same(fit(case._replace(options=case.options | SWITCHES[switch])), in_one_piece(name))


def test_nothing_is_compiled_for_distillation():
    """As in TRL's own: it calls the backbone beside the model that is compiled."""
    name = "distillation"
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    counts = importlib.import_module("torch._dynamo.utils").counters["frames"]
    before = dict(counts)
    for own in (False, True):
        assert_same(fit(Case(name, CASES[name].options | options, own=own)), in_one_piece(name))
    assert dict(counts) == before


@pytest.mark.parametrize("adapter", [False, True])
def test_bf16_of_distillation_changes_nothing(adapter):
    """Nor in TRL's own: accelerate's autocast is around the forward that its loss takes out."""
    name = "distillation of an adapter" if adapter else "distillation"
    for own in (False, True):
        options = CASES[name].options | {"bf16": True}
        assert_same(fit(Case("distillation", options, adapter, own)), in_one_piece(name))


def distance(found, expected):
    """Between all changes, relative to those expected."""
    both = [torch.cat([t.flatten() for t in each.moved.values()]) for each in (found, expected)]
    return (both[0] - both[1]).norm() / both[1].norm()


@pytest.mark.parametrize("name", ["sdft, base", "sdft, adapters off", "sdft, ema of an adapter"])
def test_bf16_of_sdft_is_as_near_as_trls_own(name):
    case = CASES[name]._replace(options=CASES[name].options | {"bf16": True})
    own = distance(fit(case._replace(own=True)), in_one_piece(name))
    assert 0 < own < 0.05
    # nor much nearer, which would be without any rounding
    assert own / 2 < distance(fit(case), in_one_piece(name)) < 2 * own


@pytest.mark.parametrize("name", trl_run.PLACES)
def test_evaluation(name):
    """Of batches of other sizes than those of training, before any."""
    found = []
    for own in (False, True):
        with TemporaryDirectory() as folder:
            trainer = trl_run.make(Case(name, {}, own=own), folder, per_device_eval_batch_size=3)
            evaluated = trainer.evaluate(trainer.train_dataset)
        found.append({k: v for k, v in evaluated.items() if k.endswith(("_loss", "_entropy"))})
    assert "eval_loss" in found[0]
    assert found[0] == pytest.approx(found[1], rel=CLOSE)

"""Guards: the KL to the base model by another way, what is done about it, and steps that are bad.

The KL is compared with full logits of two plain models, one example at a time, in fp64.
"""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bidistill import checkpoint, train
from bidistill.config import ContrastSettings, GuardConfig, TrainConfig
from bidistill.data.readers import write_records
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from bidistill.guards import KLGuard
from bidistill.models import adapters_off
from bidistill.moved import Watch, stride
from bidistill.prepare import prepare
from bidistill.settings import check
from bidistill.world import World
from tests.trainer import cut, cut_guards
from tests.trainer.cut import Case
from tests.trainer.test_step import logits_of
from tests.trainer.test_train import (
    WEIGHTS,
    Power,
    dying_at,
    full,
    in_folder,
    log_of,
    pull_the_plug,
    weights_of,
)
from tests.trainer.tiny import make_model

KINDS = [("lora", True), ("lora, head too", True), ("lora, head too", False)]
KINDS += [("full", True), ("full", False), ("full, head frozen", False)]


def plain_kl(base, student, examples):
    """KL(base || student) per answer token, by full logits; both read the student's view."""
    total, tokens = 0.0, 0
    for e in examples:
        with torch.no_grad():
            log_p = logits_of(base, e.student, e.answer_ids).log_softmax(-1)
            log_q = logits_of(student, e.student, e.answer_ids).log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        tokens += len(e.answer_ids)
    return total / tokens


@cache
def plainly(training, tied, count=None):
    """The KL that `cut_guards.guarded` must find before the weights are moved, and after."""
    base = make_model(tied)
    cut.double(base)
    student = cut.model_of(Case(training, tied), World()).eval()
    before = plain_kl(base, student, cut_guards.examples_of(count))
    cut_guards.move(student)
    return before, plain_kl(base, student, cut_guards.examples_of(count))


def assert_right(found, training, tied, count=None):
    before, after, again, training_still, _ = found
    expected = plainly(training, tied, count)
    assert expected[1] > 1e-3, "the student has to differ"
    assert (before, after) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert again == after
    assert training_still


@pytest.mark.parametrize(("training", "tied"), KINDS)
def test_kl_is_that_of_two_plain_models(training, tied):
    assert_right(cut_guards.guarded(Case(training, tied), alone=True), training, tied)


@pytest.mark.parametrize(("size", "shard"), [(2, None), (2, 1), (4, 2)])
@pytest.mark.parametrize(("training", "tied"), KINDS)
def test_ranks_measure_the_same(ranks, training, tied, size, shard):
    first, *others = ranks(size).run(cut_guards.guarded, Case(training, tied, shard))
    assert_right(first, training, tied)
    assert all(other == first for other in others)


def test_packs_and_idle_ranks_do_not_matter(ranks):
    found = cut_guards.guarded(Case("full"), chunk=100, alone=True)
    assert found[-1] > 3
    assert_right(found, "full", True)
    for one in ranks(2).run(cut_guards.guarded, Case("full"), None, 100):
        assert_right(one, "full", True)
    # one example, four ranks
    for one in ranks(4).run(cut_guards.guarded, Case("full"), 1):
        assert_right(one, "full", True, 1)


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_an_untrained_student_in_bf16_is_the_base_model(config, ranks, make):
    config = make(guarded(config, 1.0))
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    found = prepare(config, World()).guard.measure()
    assert found == pytest.approx(0, abs=1e-6)
    # on CPUs, FSDP rounds the student's head to bf16, and nobody the copy of a head that trains
    assert ranks(2).run(cut_guards.fresh, config) == pytest.approx([0, 0], abs=1e-5)


def test_contrastive_adapters_are_measured_without_dropout(config, records, tokenizer):
    contrast = {"contrast": ContrastSettings(), "targets": ("down_proj",)}
    adapter = replace(config.model.adapter, dropout=0.5, **contrast)
    config = replace(guarded(config, 1.0), model=replace(config.model, adapter=adapter))
    ready = prepare(config, World())
    guard, model = ready.guard, ready.model.train()
    assert isinstance(guard, KLGuard)
    assert guard.measure() == pytest.approx(0, abs=1e-6)
    cut_guards.move(model)
    state = torch.get_rng_state()
    found = guard.measure()
    assert guard.measure() == found
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    kept = [r for r in records if r.role in ("neighbor", "retain")]
    examples = build_examples(kept, tokenizer, {})
    assert (guard.examples, len(examples)) == (4, 4)
    expected = plain_kl(base, model.eval(), examples)
    assert found == pytest.approx(expected, rel=1e-3)
    with adapters_off(model):
        assert plain_kl(base, model, examples) == pytest.approx(0, abs=1e-6)


def test_examples_are_drawn_by_the_seed(config, records, tmp_path):
    many = [replace(records[-1], id=f"r{k}", question=f"{k}+1?") for k in range(40)]
    write_records(config.data.train, [*records, *many[1:]])
    config = replace(config, guard=GuardConfig(kl_budget=1.0, examples=10))

    def drawn(**changes):
        guard = prepare(replace(config, **changes), World()).guard
        found = {e.id for batch, _, _ in guard.packs for e in batch.examples}
        assert len(found) == 10
        assert all(name.startswith("r") for name in found)
        return found

    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)


def guarded(config, budget, every=1, **changes):
    """The same recipe with a guard, over two roles."""
    guard = GuardConfig(kl_budget=budget, every=every, roles=("neighbor", "retain"))
    return replace(config, guard=guard, **changes)


@pytest.fixture
def course(config, tmp_path):
    """The KL after each step of a run that nothing stops, and where its checkpoints lie."""
    free = guarded(in_folder(config, tmp_path / "free"), 1e9, keep_checkpoints=99)
    train.main(free)
    kls = [entry["guard/kl"] for entry in log_of(free)]
    assert kls[-1] > kls[2] > 0, "the budget of a test would mean nothing"
    return kls, free.output / "checkpoints"


def between(kls, last_good, first_bad):
    """A budget that lets the one step pass, and not the other; counted from 1."""
    assert kls[last_good - 1] < kls[first_bad - 1]
    return (kls[last_good - 1] + kls[first_bad - 1]) / 2


def guard_of(config):
    return json.loads((config.output / "guard.json").read_text())


def checkpoints_of(config):
    return sorted(path.name for path in (config.output / "checkpoints").iterdir())


def assert_exports(config, checkpoints, step):
    """The result has the weights of a checkpoint of the run that nothing stopped."""
    path = checkpoint.at(checkpoints, step)
    saved = {}
    for file in path.glob("*.safetensors"):
        saved |= {n: t for n, t in load_file(file).items() if n.startswith("weights/")}
    result = config.output / ("adapter" if config.model.adapter else "model")
    exported = load_file(result / WEIGHTS[result.name])
    assert len(exported) == len(saved)
    for name, tensor in saved.items():
        name = name.removeprefix("weights/").replace(".default.", ".")
        assert torch.equal(exported[name], tensor), name


def test_a_run_within_the_budget_is_exported_whole(config, course):
    config = guarded(config, 1e9, every=4)
    train.main(config)
    kls, checkpoints = course
    log = log_of(config)
    assert {e["step"]: e["guard/kl"] for e in log if "guard/kl" in e} == {4: kls[3], 6: kls[5]}
    assert_exports(config, checkpoints, 6)
    record = guard_of(config)
    assert record["exported_step"] == record["last_step"] == 6
    assert record["measured"] == [{"step": 4, "kl": kls[3]}, {"step": 6, "kl": kls[5]}]
    assert record["reason"] == "all 2 measurements are within the budget"
    assert (record["examples"], record["roles"]) == (4, ["neighbor", "retain"])


def test_measuring_changes_nothing(config, tmp_path):
    free = train.main(in_folder(config, tmp_path / "free"))
    assert weights_of(train.main(guarded(config, 1e9))) == weights_of(free)


def test_beyond_the_budget_the_last_step_within_is_exported(config, course, capsys):
    kls, checkpoints = course
    # one checkpoint a step, of which one stays: and the one that may be needed
    config = guarded(config, between(kls, 3, 6), 3, checkpoint_every=1, keep_checkpoints=1)
    result = train.main(config)
    assert_exports(config, checkpoints, 3)
    assert checkpoints_of(config) == ["step-000003", "step-000005"]
    record = guard_of(config)
    assert (record["last_step"], record["exported_step"]) == (6, 3)
    assert record["measured"] == [{"step": 3, "kl": kls[2]}, {"step": 6, "kl": kls[5]}]
    assert "after step 6, beyond the budget" in record["reason"]
    assert "step 3 is exported" in capsys.readouterr().out
    before = result.stat().st_mtime_ns
    assert train.main(config, resume=True) == result
    assert "finished already" in capsys.readouterr().out
    assert result.stat().st_mtime_ns == before


def test_it_stops_there_and_not_at_the_end(config, course):
    kls, checkpoints = course
    budget = between(kls, 2, 4)
    config = guarded(config, budget, 2, checkpoint_every=100)
    train.main(config)
    assert [e["step"] for e in log_of(config)] == [1, 2, 3, 4]
    assert_exports(config, checkpoints, 2)
    assert checkpoints_of(config) == ["step-000002"]


def test_all_weights_are_guarded_too(config, tmp_path):
    free = guarded(full(in_folder(config, tmp_path / "free")), 1e9, keep_checkpoints=99)
    train.main(free)
    kls = [entry["guard/kl"] for entry in log_of(free)]
    config = guarded(full(config), between(kls, 3, 6), 3)
    with dying_at(4, pull_the_plug), pytest.raises(Power):
        train.main(config)
    train.main(config, resume=True)  # the base model is the untrained one again
    assert log_of(config)[-1]["guard/kl"] == kls[5]
    assert guard_of(config)["exported_step"] == 3
    saved = load_file(next((free.output / "checkpoints" / "step-000003").glob("*.safetensors")))
    exported = load_file(config.output / "model" / WEIGHTS["model"])
    assert exported
    assert all(torch.equal(t, saved[f"weights/{n}"]) for n, t in exported.items())


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_decides_the_same(config, course, tmp_path, step):
    kls, _ = course
    config = guarded(config, between(kls, 2, 4), 2, checkpoint_every=1, keep_checkpoints=1)
    whole = in_folder(config, tmp_path / "whole")
    train.main(whole)
    if step == 4:  # all is decided, and nothing exported
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "_export", lambda *_: pull_the_plug())
            with pytest.raises(Power):
                train.main(config)
        assert guard_of(config)["exported_step"] == 2
    else:
        with dying_at(step, pull_the_plug), pytest.raises(Power):
            train.main(config)
    result = train.main(config, resume=True)
    assert weights_of(result) == weights_of(whole.output / "adapter")
    assert guard_of(config) == guard_of(whole)
    assert checkpoints_of(config) == checkpoints_of(whole)
    timeless = [[{**e, "step_ms": 0} for e in log_of(c)] for c in (config, whole)]
    assert timeless[0] == timeless[1]


def test_nothing_within_the_budget_is_nothing_exported(config):
    config = guarded(config, 1e-12, 2, checkpoint_every=1)
    message = (
        r"^guard.kl_budget: got a KL to the base model of \S+ nats per token after step 2, the "
        r"first that was measured, expected at most 1e-12; nothing is exported: lower optim.lr"
    )
    for resume in (False, True):
        with pytest.raises(UserError, match=message):
            train.main(config, resume=resume)
        assert not (config.output / "adapter").exists()
        assert not list(config.output.glob(".*"))
        assert guard_of(config)["exported_step"] is None


def test_a_kl_that_is_no_number_is_beyond_any_budget(config, monkeypatch):
    values = iter([0.5, math.nan])
    monkeypatch.setattr(KLGuard, "measure", lambda self: next(values))
    config = guarded(config, 1e9, 2)
    train.main(config)
    record = guard_of(config)
    assert record["measured"] == [{"step": 2, "kl": 0.5}, {"step": 4, "kl": None}]
    assert record["exported_step"] == 2
    assert log_of(config)[-1]["guard/kl"] is None


def test_two_ranks_decide_together(config, course, ranks):
    adapter = replace(config.model.adapter, dropout=0.0)
    config = replace(config, model=replace(config.model, adapter=adapter), checkpoint_every=1)
    alone = guarded(in_folder(config, config.output.with_name("alone")), 1e9)
    train.main(alone)
    kls = [entry["guard/kl"] for entry in log_of(alone)]
    two = guarded(config, between(kls, 2, 4), 2, keep_checkpoints=1)
    answers = ranks(2).run(cut_guards.run, two)
    assert answers == [str(config.output / "adapter")] * 2
    found = guard_of(two)
    assert (found["last_step"], found["exported_step"]) == (4, 2)
    measured = [one["kl"] for one in found["measured"]]
    assert measured == pytest.approx([kls[1], kls[3]], rel=1e-3)
    one = in_folder(two, config.output.with_name("one"))
    train.main(one)
    right = load_file(one.output / "adapter" / WEIGHTS["adapter"])
    for name, tensor in load_file(config.output / "adapter" / WEIGHTS["adapter"]).items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-4)
    nothing = guarded(in_folder(config, config.output.with_name("nothing")), 1e-12)
    answers = ranks(2).run(cut_guards.run, nothing)
    assert answers[0] == answers[1]
    assert answers[0].startswith("guard.kl_budget: got a KL")
    assert not (nothing.output / "adapter").exists()


def test_roles_without_examples_are_refused(config):
    data = config.data.train
    data.write_text("".join(x for x in data.read_text().splitlines(True) if '"retain"' not in x))
    config = replace(config, data=replace(config.data, per_step={"forget": 1, "neighbor": 1}))
    config = replace(config, guard=GuardConfig(kl_budget=1.0, roles=("neighbor", "retain")))
    message = (
        r"^guard.roles: got 'retain', of which the data has no examples, expected some of "
        r"forget, neighbor, adversarial; change it"
    )
    with pytest.raises(UserError, match=message):
        train.main(config)
    assert not config.output.exists()


def test_roles_need_not_be_trained(config):
    """What must stay may be held out."""
    config = replace(config, data=replace(config.data, per_step={"forget": 2, "adversarial": 1}))
    train.main(guarded(config, 1e9))
    assert all(entry["guard/kl"] > 0 for entry in log_of(config)[1:])


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({}, "guard.kl_budget: got nothing, expected a value"),
        ({"kl_budget": 0}, "guard.kl_budget: got 0, expected"),
        ({"kl_budget": 1, "every": 0}, "guard.every: got 0, expected"),
        ({"kl_budget": 1, "examples": 0}, "guard.examples: got 0, expected"),
        ({"kl_budget": 1, "roles": []}, "guard.roles: got"),
        ({"kl_budget": 1, "roles": ["retian"]}, r"guard.roles.*'retian'.*did you mean 'retain'"),
        ({"kl_budget": 1, "evry": 2}, r"guard: got unknown key 'evry'.*did you mean 'every'"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused(config, guard, message):
    with pytest.raises(UserError, match=message):
        check(TrainConfig, {**train.run_folder.as_dict(config), "guard": guard})


@pytest.mark.parametrize(("training", "tied"), KINDS[::2])
@pytest.mark.parametrize(("how", "shard"), [("backward", None), ("backward", 1), ("part", None)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    ranks, training, tied, how, shard
):
    case = Case(training, tied, shard, double=False)
    found = ranks(2).run(cut_guards.poisoned, case, how)
    assert all(one.unmoved and one.moved for one in found)
    logs = [[{**entry, "step_ms": 0} for entry in one.log] for one in found]
    assert [e["skipped"] for e in logs[0]] == [e["skipped"] for e in logs[1]] == [1, 0]
    assert [e["moved"] > 0.1 for e in logs[0]] == [False, True]
    assert all(math.isfinite(one[0]["loss"]) for one in logs), "the gradient is to be bad alone"
    assert logs[0][1] == logs[1][1]
    if how == "part":
        assert [one.finite_here for one in found] == [True, False]
    for one, other in zip(found[0].weights, found[1].weights, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_a_norm_that_only_one_rank_sees_is_seen_by_all(ranks):
    """Where each rank holds all gradients, none of them adds up the others' norms."""
    found = ranks(2).run(cut_guards.poisoned, Case("full", shard=1, double=False), "part")
    assert [one.finite_here for one in found] == [True, False]
    assert [one.log[0]["skipped"] for one in found] == [1, 1]
    assert all(one.unmoved and one.moved for one in found)
    assert all(torch.equal(a, b) for a, b in zip(*(one.weights for one in found), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moved_is_the_share_that_moved(ranks, dtype):
    found, exact = cut_guards.moves(None, dtype, alone=True)
    assert found == exact
    assert exact > 0.99 if dtype == torch.float32 else 0.02 < exact < 0.5
    for size, shard in ((2, None), (2, 1), (4, 2)):
        for found, exact in ranks(size).run(cut_guards.moves, shard, dtype):
            assert found == pytest.approx(exact, rel=1e-12)


def test_moved_of_some_entries_is_near_that_of_all(ranks):
    found, exact = cut_guards.moves(None, torch.bfloat16, alone=True, sample=256)
    assert 0 < abs(found - exact) < 0.03
    (found, exact), _ = ranks(2).run(cut_guards.moves, None, torch.bfloat16, False, 256)
    assert 0 < abs(found - exact) < 0.03


def test_moved_does_not_stay_in_some_columns():
    weight = torch.nn.Parameter(torch.zeros(1024, 1024))
    small = torch.nn.Parameter(torch.zeros(10))
    watch = Watch([weight, small])
    with torch.no_grad():
        weight[:, ::2] = 1
        small[:5] = 1
    assert stride(weight.numel()) > 1
    assert watch.share(World()) == pytest.approx(0.5, abs=0.001)
    assert Watch([weight, small]).share(World()) == 0


def test_the_log_says_what_moved(config):
    """A of fresh adapters has no gradient in the first step."""
    result = train.main(config)
    tensors = load_file(result / WEIGHTS["adapter"])
    sizes = {s: sum(t.numel() for n, t in tensors.items() if s in n) for s in ("_A.", "_B.")}
    first, *others = (entry["moved"] for entry in log_of(config))
    assert first == pytest.approx(sizes["_B."] / sum(sizes.values()), rel=0.01)
    assert all(0.95 < one <= 1 for one in others)

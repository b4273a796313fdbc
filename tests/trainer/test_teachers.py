"""Each kind of teacher against two plain models, and over ranks against one process.

The reference takes one example at a time, with whole logits, and keeps the teacher as a second
model: the student's copy, a copy whose weights are averaged by hand, or another model altogether.
"""

import gc
import json
import weakref
from dataclasses import replace
from functools import cache
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from transformers import GraniteForCausalLM

from bidistill import checkpoint, train
from bidistill import prepare as prepare_module
from bidistill.config import ObjectiveConfig
from bidistill.data.loader import RoleLoader
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from bidistill.loading import load_shared
from bidistill.losses import LOSSES
from bidistill.objectives import Objectives
from bidistill.prepare import prepare
from bidistill.teacher import kinds as teachers
from bidistill.teacher import model as teacher_model
from bidistill.world import World
from bidistill_kernels import LogitTransform
from tests.trainer import cut, cut_teachers
from tests.trainer.cut import Case
from tests.trainer.cut_teachers import DECAY
from tests.trainer.ranks import Ranks
from tests.trainer.test_distributed import MODELS, assert_equal, relative, relative_together
from tests.trainer.test_step import logits_of
from tests.trainer.tiny import make_model, make_tokenizer

KINDS = ("frozen", "live", "ema")


@pytest.fixture(scope="module")
def two():
    """Two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@cache
def whole(case, kind):
    return cut_teachers.run(case, kind, alone=True)


def plain_run(case, kind):
    """The steps of `cut.train` by two models; weights at the end and gradients of the last step."""
    config, student = cut.config_of(case), cut.model_of(case, World()).eval()
    # made anew: a deep copy would share the forwards that `double` has put in place
    teacher = cut.model_of(case, World()).eval()
    if kind == "frozen":
        teacher = cut_teachers.frozen_model(case)
    named = checkpoint.trainable(student)
    followers = checkpoint.trainable(teacher)
    examples = build_examples(cut.records(), make_tokenizer(), cut.CONTEXTS)
    losses = []
    for batch, _ in islice(RoleLoader(examples, cut.PER_STEP, 0), cut.STEPS):
        student.zero_grad()
        total, rows = torch.zeros((), dtype=torch.float64), 0
        for example in batch.examples:
            objective = cut.OBJECTIVES[example.role]
            s = logits_of(student, example.student, example.answer_ids)
            with torch.no_grad():
                t = logits_of(teacher, example.teacher, example.answer_ids)
            kept = slice(1 if objective.positions == "first" else None)
            s, t, one = s[kept], t[kept], torch.eye(t.shape[1], dtype=t.dtype)
            # losses stand against their definitions in tests/kernels; here the logits are whole
            function = LOSSES[objective.loss].function
            loss = function(s, one, t, one, reduction="sum", **objective.options)
            total, rows = total + objective.weight * loss, rows + len(s)
        (total / rows).backward()
        losses.append(total.item() / rows)
        with torch.no_grad():
            for name, weight in named.items():
                weight -= config.optim.lr * cut_lr(config, len(losses) - 1) * weight.grad
                if kind == "live":
                    followers[name].copy_(weight)
                if kind == "ema":
                    followers[name].copy_(DECAY * followers[name] + (1 - DECAY) * weight)
    return {n: p.grad for n, p in named.items()}, dict(named), losses


def cut_lr(config, step):
    """Share of the rate at a step."""
    from bidistill.update import learning_rate

    return learning_rate(config.optim, step, config.steps) / config.optim.lr


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("training", "tied"), MODELS[:4])
def test_equals_two_plain_models(training, tied, kind):
    case = Case(training, tied)
    gradients, weights, losses = plain_run(case, kind)
    found = whole(case, kind)
    assert [entry["loss"] for entry in found.log] == pytest.approx(losses, rel=1e-10)
    assert relative(found.gradients, gradients) < 1e-9
    assert relative(found.parameters, weights) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("training", "tied"), MODELS[:4])
def test_two_ranks_equal_one_process(two, training, tied, kind):
    found = two.run(cut_teachers.run, Case(training, tied, accumulate=2), kind)
    assert_equal(found[0], whole(Case(training, tied), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"shard": 1}, {"recompute": True}], ids=str)
def test_however_the_model_is_cut(two, kind, change):
    case = Case("full", tied=False)
    found = two.run(cut_teachers.run, case._replace(**change), kind)
    assert_equal(found[0], whole(case, kind))


def test_the_kinds_differ():
    """Else the tests above prove nothing."""
    for training in ("lora", "full"):
        results = [whole(Case(training), kind) for kind in KINDS]
        for one, other in zip(results, [*results[1:], results[0]], strict=True):
            assert relative(one.gradients, other.gradients) > 1e-6


@pytest.mark.parametrize("kind", ["live", "ema"])
def test_in_bf16_every_adapter_hears_the_student(kind):
    """Though its weights were read without a gradient just before."""
    case = Case("lora", dtype="bfloat16", double=False)
    exact = whole(Case("lora", double=False), kind)
    found = whole(case, kind)
    assert found.gradients.keys() == found.parameters.keys()
    assert 1e-4 < relative_together(found.gradients, exact.gradients) < 0.3


@pytest.mark.parametrize("training", ["lora", "full"])
def test_in_bf16_rows_are_those_of_the_averages(training):
    found, expected = cut_teachers.rows_of_averages(
        Case(training, dtype="bfloat16", double=False), alone=True
    )
    assert_same_rows(found, expected)


@pytest.mark.parametrize(("training", "tied"), MODELS[1:4])
def test_a_stray_forward_leaves_no_weights_behind(two, training, tied):
    """Gathered by a forward without a backward, they would stand in for the averages."""
    for found, expected in two.run(cut_teachers.rows_of_averages, Case(training, tied)):
        assert_same_rows(found, expected)


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("training", "tied"), [("lora", True), ("full", False)])
def test_averages_resume_bit_for_bit(two, tmp_path, training, tied):
    case = Case(training, tied, double=False)
    first, *_ = two.run(cut_teachers.saved, case, tmp_path)
    again, *_ = two.run(cut_teachers.restored, case, tmp_path)
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    alone = cut_teachers.restored(case, tmp_path, alone=True)
    averages = {name: value for name, value in first.items() if name.startswith("teacher/")}
    assert averages
    assert all(torch.equal(alone[name], value) for name, value in averages.items())


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def losses_of(config):
    lines = (config.output / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def taught(config, name, **changes):
    """The recipe with another teacher, and a folder of its own."""
    teacher = replace(config.teacher, cache_folder=config.output / "../rows", **changes)
    return replace(config, teacher=teacher, output=config.output.with_name(name))


def full(config):
    return replace(config, model=replace(config.model, adapter=None))


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_a_run_by_averages_resumes_bit_for_bit(config, make, monkeypatch):
    config = make(taught(config, "ema", kind="ema", cache="off", ema_decay=0.9))
    undisturbed = train.main(replace(config, output=config.output.with_name("whole")))
    original = train.train_step

    def dying(*arguments):
        if arguments[6] == 5:  # a checkpoint was written after the fourth
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    result = weights_of(train.main(config, resume=True))
    expected = weights_of(undisturbed)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    # and with averages that begin anew it would not
    monkeypatch.setattr(teachers.Ema, "tensors", lambda self: {})
    (config.output / result_name(config)).rename(config.output.with_name("moved"))
    for path in (config.output / "checkpoints").glob("step-000006"):
        path.rename(config.output.with_name("later"))
    other = weights_of(train.main(config, resume=True))
    assert any(not torch.equal(other[name], value) for name, value in expected.items())


def result_name(config):
    return "model" if config.model.adapter is None else "adapter"


def test_a_skipped_step_leaves_the_averages():
    model = cut.model_of(Case("lora"), World())
    teacher = teachers.Ema(model, cut.config_of(Case("lora")).model, DECAY)
    before = {name: t.clone() for name, t in teacher.tensors().items()}
    with torch.no_grad():
        for weight in teacher.trained.values():
            weight.add_(1)
    teacher.after_step(updated=False)
    assert all(torch.equal(t, before[name]) for name, t in teacher.tensors().items())
    teacher.after_step(updated=True)
    for name, t in teacher.tensors().items():
        torch.testing.assert_close(t, before[name] + 1 - DECAY)


def test_a_frozen_copy_is_the_base_model(config):
    """The same weights, so the same run, wherever the rows are kept."""
    config = replace(config, steps=2)
    train.main(expected := taught(config, "base", cache="off"))
    for kept in ("off", "memory"):
        train.main(found := taught(config, f"frozen, {kept}", kind="frozen", cache=kept))
        assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-6), kept
    # rows on disk are rounded
    train.main(found := taught(config, "disk", kind="frozen", cache="disk"))
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=0.03)


def test_all_weights_train_beside_a_frozen_copy(config):
    config = full(replace(config, steps=3))
    train.main(kept := taught(config, "kept", cache="memory"))
    train.main(frozen := taught(config, "frozen", kind="frozen", cache="off"))
    assert losses_of(frozen) == pytest.approx(losses_of(kept), rel=1e-5)
    assert losses_of(frozen)[-1] < losses_of(frozen)[0]


@pytest.mark.parametrize("kept", ["off", "memory", "disk"])
def test_another_model_teaches_by_its_own_head(config, other_dir, kept):
    config = taught(config, "other", kind="frozen", path=str(other_dir), cache=kept)
    ready = prepare(config, World())
    assert ready.objectives.teacher_transform == LogitTransform(scale=0.25, vocab_limit=258)
    assert ready.objectives.transform == LogitTransform(vocab_limit=258)
    batch, _ = next(iter(ready.loader))
    student, teacher = ready.model.eval(), GraniteForCausalLM.from_pretrained(other_dir)
    rows, expected = ready.teacher.rows(batch.parts[0]), []
    for example in batch.parts[0].examples:
        with torch.no_grad():
            expected.append(logits_of(teacher, example.teacher, example.answer_ids)[:, :258])
    own = ready.objectives.teacher_transform(rows.hidden @ rows.weight.T)
    torch.testing.assert_close(
        own, torch.cat(expected), rtol=0, atol=0.1 if kept == "disk" else 1e-3
    )
    objective = ObjectiveConfig(loss="bidirectional_kl", options={"forward": 1, "reverse": 0})
    objectives = Objectives(
        dict.fromkeys(config.objectives, objective),
        ready.objectives.transform,
        teacher_transform=ready.objectives.teacher_transform,
    )
    packed = batch.parts[0].student()
    loss = objectives.for_step(batch.parts[0].examples, packed)
    found = student.distill_step(packed, loss, rows).loss
    log_q = [
        logits_of(student, e.student, e.answer_ids).log_softmax(-1) for e in batch.parts[0].examples
    ]
    log_p = torch.cat(expected).log_softmax(-1)
    plain = (log_p.exp() * (log_p - torch.cat(log_q))).sum(-1).mean()
    torch.testing.assert_close(found, plain, rtol=0.02 if kept == "disk" else 1e-4, atol=0)


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_a_frozen_model_goes_when_its_rows_are_kept(config, monkeypatch, kept):
    load, loaded = teacher_model.load, []

    def watched(*arguments):
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teacher_model, "load", watched)
    config = taught(config, "frozen", kind="frozen", cache=kept)

    def before_the_student(*arguments):
        assert [reference() for reference in loaded] == [None] * len(loaded)
        return load_shared(*arguments)

    monkeypatch.setattr(prepare_module, "load_shared", before_the_student)
    gc.disable()  # it might come by chance
    try:
        ready = prepare(config, World())
    finally:
        gc.enable()
    assert ready.teacher is not None
    assert len(loaded) == 1
    again = prepare(config, World())  # on disk they are found, and nothing is loaded
    assert again.teacher is not None
    assert len(loaded) == (1 if kept == "disk" else 2)


def test_the_dtype_of_a_frozen_teacher_is_its_own(config):
    config = taught(config, "bf16", kind="frozen", dtype="bfloat16", cache="off")
    ready = prepare(config, World())
    batch, _ = next(iter(ready.loader))
    rows = ready.teacher.rows(batch.parts[0])
    assert rows.hidden.dtype == rows.weight.dtype == torch.bfloat16
    assert next(ready.model.parameters()).dtype == torch.float32
    train.main(config)
    train.main(fp32 := taught(config, "fp32", dtype=None))
    assert losses_of(config) == pytest.approx(losses_of(fp32), rel=0.1)
    assert losses_of(config) != losses_of(fp32)


REFUSED = {
    "live": "teacher.cache: got memory with teacher.kind live, whose rows change .* expected off",
    "ema": "teacher.cache: got memory with teacher.kind ema, whose rows change .* expected off",
}


@pytest.mark.parametrize(("kind", "message"), REFUSED.items())
def test_rows_that_change_are_not_kept(config, kind, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        train.main(taught(config, "refused", kind=kind))
    from bidistill.teacher.cache import main

    with pytest.raises(UserError, match=rf"^teacher\.kind: got {kind}, whose rows change"):
        main(taught(config, "refused", kind=kind, cache="off"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "elsewhere"}, "teacher.path: got elsewhere with teacher.kind base, which has no"),
        ({"dtype": "bfloat16"}, "teacher.dtype: got bfloat16 with teacher.kind base, which has no"),
        ({"kind": "frozen", "path": "nowhere"}, "teacher.path: got nowhere, expected a folder"),
    ],
    ids=["path", "dtype", "nowhere"],
)
def test_what_a_teacher_cannot_be_is_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        train.main(taught(config, "refused", **changes))
    assert not config.output.exists()


def test_another_vocabulary_is_refused(config, other_dir, tmp_path):
    folder = tmp_path / "swapped"
    folder.mkdir()
    for path in other_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "tokenizer.json").read_text()
    content = json.loads(text)
    ids = content["model"]["vocab"]
    ids["@"], ids["a"] = ids["a"], ids["@"]
    swapped = json.dumps(content)
    (folder / "tokenizer.json").write_text(swapped)
    with pytest.raises(UserError, match=r"teacher.path: got .*, where token '@' has id \d+, expec"):
        train.main(taught(config, "refused", kind="frozen", path=str(folder)))


def test_a_head_without_all_ids_is_refused(config, tokenizer, tmp_path):
    folder = tmp_path / "short"
    short = make_model()
    short.resize_token_embeddings(200)
    short.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = taught(config, "short", kind="frozen", path=str(folder))
    with pytest.raises(UserError, match=r"heads of 258 .* and 200 ids .*the tokenizer's 258"):
        teacher_model.check_vocabulary(config, tokenizer)

"""Best ids on disk, and the loss that takes them, against whole logits in plain PyTorch.

The reference has the logits of one row at a time, takes the best ids and puts all others into one
outcome. What the store rounds is bounded row by row; what follows from rounded numbers is exact.
"""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from bidistill import cli, models, plan, train
from bidistill.config import ObjectiveConfig, as_dict
from bidistill.data.loader import Batch
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from bidistill.loading import empty_model
from bidistill.models import adapters_off, attach_distill_step
from bidistill.objectives import Objectives
from bidistill.plan.step import BestIds
from bidistill.plan.tracker import Tracker
from bidistill.prepare import prepare
from bidistill.teacher import cache as teacher_cache
from bidistill.teacher import model as teacher_model
from bidistill.teacher.build import build_rows
from bidistill.teacher.compute import HiddenCache
from bidistill.teacher.forms import Best
from bidistill.teacher.store import INDEX, TeacherStore
from bidistill.world import World
from bidistill_kernels import LogitTransform, linear_topk_kl
from tests.trainer import cut_topk
from tests.trainer.cut import Case
from tests.trainer.cut_topk import MADE_OF
from tests.trainer.ranks import Ranks
from tests.trainer.test_distributed import assert_equal
from tests.trainer.test_step import CONTEXTS, gradients, logits_of, make_student
from tests.trainer.test_teacher_store import files_of, flip, move
from tests.trainer.test_train import full, in_folder, weights_of

V = 258
K = 8
KINDS = ["lora", "full, tied", "full, untied"]
ROUNDING, SMALLEST = 2.0**-11, 2.0**-25
"""Largest relative error of a number in fp16; largest error of one below its normal numbers."""
FLOOR = torch.tensor(1e-6, dtype=torch.float64)
"""What a teacher's tail counts as at least; of the kernels."""
TAIL_ERROR = 1e-6
"""Error of a teacher's tail by fp32, K = 64, and by the floor; ``e`` in `TeacherStore`."""


@pytest.fixture
def examples(records, tokenizer):
    return build_examples(records, tokenizer, CONTEXTS)


def store_of(model, examples, folder, k=K, transform=None):
    build_rows(model, examples, folder, MADE_OF, form=Best(k, transform or LogitTransform()))
    return TeacherStore(folder, verify=True)


def bucketed(log_p, ids):
    """Log-probabilities of some ids and of all others together. Shapes (N, V), (N, K)."""
    others = log_p.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), others], dim=1)


def plain_losses(student, teacher, options, k, *, on_disk=False):
    """The loss of each row by whole logits, (N, V)."""
    ids = teacher.topk(k).indices
    log_p, log_q = bucketed(teacher.log_softmax(-1), ids), bucketed(student.log_softmax(-1), ids)
    if on_disk:
        log_p = log_p.half().double().log_softmax(-1)
    log_p[:, -1].clamp_(min=FLOOR.log())
    if options.get("tail") == "renormalize" or k == V:
        log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    return options.get("forward", 1.0) * forward + options.get("reverse", 0.0) * reverse


OPTIONS = [
    {"forward": 1.0, "reverse": 0.0},
    {"forward": 0.25, "reverse": 0.75},
    {"forward": 0.5, "reverse": 0.5, "tail": "renormalize"},
]


def objectives_of(options, k=None):
    """Groups, weights and positions as in any recipe, and one role that needs no teacher."""
    kl = ObjectiveConfig(loss="topk_kl", options=options if k is None else {**options, "k": k})
    return {
        "forget": kl,
        "neighbor": replace(kl, weight=0.5),
        "retain": ObjectiveConfig(loss="cross_entropy", weight=2.0),
        "adversarial": replace(kl, weight=4.0, positions="first"),
    }


def plain_step(model, teacher, batch, objectives, k, *, on_disk):
    """The loss of a step, an example at a time."""
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for example in batch.examples:
        objective = objectives[example.role]
        student = logits_of(model, example.student, example.answer_ids)
        with torch.no_grad(), adapters_off(teacher):
            taught = logits_of(teacher, example.teacher, example.answer_ids)
        if objective.loss == "cross_entropy":
            losses = -student.log_softmax(-1)[range(len(student)), list(example.answer_ids)]
        else:
            losses = plain_losses(student, taught, objective.options, k, on_disk=on_disk)
        losses = losses[:1] if objective.positions == "first" else losses
        total, rows = total + objective.weight * losses.sum(), rows + len(losses)
    return total / rows


def steps(model, batch, rows, objectives, plain):
    """Loss and gradients of a fused step, and those of the plain one."""
    found = []
    student = batch.student()
    loss = Objectives(objectives).for_step(batch.examples, student)
    for run in (lambda: model.distill_step(student, loss, rows).loss, plain):
        model.zero_grad()
        value = run()
        value.backward()
        found.append((value.detach(), gradients(model)))
    return found


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        assert scale > 1e-5, f"{name}: a gradient of zero proves nothing"
        error = (found[1][name] - gradient).abs().max().item() / scale
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_equals_whole_logits(examples, kind, options, tmp_path):
    """From the store by the rounded numbers, and within 1 % by exact ones; on the fly exactly."""
    model, teacher, batch = make_student(kind), make_student(kind), Batch(tuple(examples))
    stored = store_of(model, examples, tmp_path / "rows").for_batch(batch)
    cache = HiddenCache(model, examples)
    if kind != "lora":
        move(model)
    objectives = objectives_of(options)

    def plain(on_disk):
        return plain_step(model, teacher, batch, objectives, K, on_disk=on_disk)

    assert_same(*steps(model, batch, stored, objectives, lambda: plain(True)), 1e-6)
    assert_same(*steps(model, batch, stored, objectives, lambda: plain(False)), 0.01)
    chosen = objectives_of(options, K)
    assert_same(*steps(model, batch, cache.for_batch(batch), chosen, lambda: plain(False)), 1e-6)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_with_all_ids_it_is_the_full_divergence(examples, options, tmp_path):
    model, batch = make_student("full, untied"), Batch(tuple(examples))
    stored = store_of(model, examples, tmp_path / "rows", k=10 * V).for_batch(batch)
    assert stored.ids.shape[1] == V
    hidden = HiddenCache(model, examples).for_batch(batch)
    move(model)
    full_kl = objectives_of(options)
    for role in ("forget", "neighbor", "adversarial"):
        full_kl[role] = replace(full_kl[role], loss="bidirectional_kl")
    found = [
        step_loss(model, batch, rows, objectives)
        for rows, objectives in (
            (hidden, full_kl),
            (hidden, objectives_of(options, V)),
            (stored, objectives_of(options)),
        )
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=2e-3, atol=0)
    assert found[2] != found[0]


@torch.no_grad()
def step_loss(model, batch, rows, objectives):
    student = batch.student()
    loss = Objectives(objectives).for_step(batch.examples, student)
    return model.distill_step(student, loss, rows).loss


def whole_logits(model, teacher, batch):
    """Logits of all rows of a batch, student's and teacher's; fp64."""
    with torch.no_grad():
        student = [logits_of(model, e.student, e.answer_ids) for e in batch.examples]
        with adapters_off(teacher):
            taught = [logits_of(teacher, e.teacher, e.answer_ids) for e in batch.examples]
    return torch.cat(student), torch.cat(taught)


@pytest.mark.parametrize("k", [1, 4, 32, V])
@pytest.mark.parametrize("options", [{"forward": 1.0}, {"forward": 0.0, "reverse": 1.0}], ids=str)
def test_the_loss_moves_within_the_bound(examples, options, k, tmp_path):
    """The bound in the docstring of `TeacherStore`, row by row."""
    model, batch = make_student("full, untied"), Batch(tuple(examples))
    stored = store_of(model, examples, tmp_path / "rows", k=k).for_batch(batch)
    teacher = make_student("full, untied")
    move(model)
    student, taught = whole_logits(model, teacher, batch)
    outcomes = bucketed(taught.log_softmax(-1), stored.ids)[:, : k + (k < V)]
    others = bucketed(student.log_softmax(-1), stored.ids)[:, : k + (k < V)]
    change = (ROUNDING * outcomes.abs()).clamp(min=SMALLEST).amax(-1)
    gap = outcomes - others
    spread = gap.amax(-1) - gap.amin(-1)
    forward, reverse = options["forward"], options.get("reverse", 0.0)
    bound = forward * change * (spread + change) / 2 + reverse * 2 * change

    def losses(values):
        p = torch.cat([values, torch.log(-values.logsumexp(-1, keepdim=True).expm1())], 1)
        p, q = p[:, : k + (k < V)], others
        return forward * (p.exp() * (p - q)).sum(-1) + reverse * (q.exp() * (q - p)).sum(-1)

    exact = forward * (outcomes.exp() * gap).sum(-1) - reverse * (others.exp() * gap).sum(-1)
    moved = (losses(stored.values) - exact).abs()
    assert (moved <= bound + 1e-12).all()
    assert moved.mean() > 1e-4 * bound.mean(), "a bound that far off says nothing"
    wrong = (losses(stored.values.roll(1, 0)) - exact).abs()
    assert (wrong > bound).any(), "rows of another token must break the bound"


@pytest.mark.parametrize("options", [{"forward": 1.0}, {"forward": 0.0, "reverse": 1.0}], ids=str)
def test_a_small_tail_moves_the_loss_in_fp32_as_the_bound_says(options):
    """From fp32 logits through fp16 into the loss itself, which knows small tails but roughly."""
    k, vocabulary, random = 64, 512, torch.Generator().manual_seed(0)
    tails = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 2e-6, 1e-6, 3e-7, 1e-8], dtype=torch.float64)
    tail = tails.repeat_interleave(64)[:, None]
    q = 0.99 * torch.rand(tail.shape, dtype=torch.float64, generator=random)

    def logits(tail, spread):
        inside = spread * torch.randn(len(tail), k, dtype=torch.float64, generator=random)
        outside = torch.zeros(len(tail), vocabulary - k, dtype=torch.float64)
        parts = inside.log_softmax(-1) + (-tail).log1p(), outside.log_softmax(-1) + tail.log()
        return torch.cat(parts, dim=1).float()

    student, taught, head = logits(q, 0.5), logits(tail, 2.0), torch.eye(vocabulary)
    ids, log_probs = Best(k, LogitTransform())._best(taught, head, None)
    columns = {"ids": ids.to(torch.uint16), "log_probs": log_probs.half()}
    stored = Best.read(columns, torch.float32, (None, None)).at(torch.arange(len(tail)))
    found = linear_topk_kl(student, head, stored, reduction="none", **options).double()

    outcomes = bucketed(taught.double().log_softmax(-1), ids)
    others = bucketed(student.double().log_softmax(-1), ids)
    gap = outcomes - others
    forward, reverse = options["forward"], options.get("reverse", 0.0)
    exact = forward * (outcomes.exp() * gap).sum(-1) - reverse * (others.exp() * gap).sum(-1)
    change = (ROUNDING * outcomes.abs()).clamp(min=SMALLEST).amax(-1)
    spread = gap.amax(-1) - gap.amin(-1)
    rounded = forward * change * (spread + change) / 2 + reverse * 2 * change
    seen = (2 * TAIL_ERROR / outcomes[:, -1].exp()).log1p()
    more = forward * TAIL_ERROR * (spread + seen)
    more += reverse * (others[:, -1].exp() * seen + TAIL_ERROR)
    moved = (found - exact).abs()
    assert (moved <= rounded + more).all()
    if reverse:
        assert (moved > rounded).any(), "rounding alone would do"
        assert (moved > 0.5 * (rounded + more)).any(), "a bound that far off says nothing"
    else:
        assert (moved <= rounded).all(), "the tail is lost in the rounding"


def test_fp16_rounds_as_the_bound_says():
    numbers = torch.linspace(1, 2, 100_001, dtype=torch.float64)
    error = ((numbers.half().double() - numbers) / numbers).abs().max().item()
    assert ROUNDING * 0.99 < error <= ROUNDING
    small = torch.linspace(0, 2.0**-14, 100_001, dtype=torch.float64)
    assert (small.half().double() - small).abs().max().item() <= SMALLEST


def test_the_error_falls_with_k(examples):
    """Merging outcomes cannot raise a divergence, so it grows with K up to that of all ids."""
    model, batch = make_student("lora"), Batch(tuple(examples))
    rows = HiddenCache(model, examples).for_batch(batch)
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, V)
    losses = [step_loss(model, batch, rows, objectives_of({}, k)).item() for k in sizes]
    errors = [losses[-1] - loss for loss in losses]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 5 * errors[-3] > 0


def test_the_probability_of_all_other_ids_comes_back(examples, tmp_path):
    """Of a teacher that is sure of itself, where rounded ids alone would not tell it."""
    model, batch, sure = make_student("lora"), Batch(tuple(examples)), LogitTransform(scale=4.0)
    stored = store_of(model, examples, tmp_path / "rows", transform=sure).for_batch(batch)
    _, taught = whole_logits(model, model, batch)
    true = bucketed(sure(taught).log_softmax(-1), stored.ids)
    tail, kept = true[:, -1].exp(), -stored.values.logsumexp(-1).expm1()
    assert ((kept - tail) / tail).abs().max() < 0.01
    alone = -true[:, :-1].half().double().logsumexp(-1).expm1()
    assert ((alone - tail) / tail).abs().max() > 0.01


@pytest.mark.parametrize(
    ("vocabulary", "kept", "size"),
    [(V, torch.uint16, 4 * K + 2), (2**16 + 1, torch.int32, 6 * K + 2)],
)
def test_bytes_of_a_token(examples, tmp_path, vocabulary, kept, size):
    model = make_student("lora")
    if vocabulary != V:
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, initializer_range=0.5,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():  # an id that two bytes do not hold
            model.lm_head.weight[-1] = 0
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(vocabulary))
            model.lm_head.bias[-1] = 100.0
        attach_distill_step(model)
    form = Best(K, LogitTransform())
    assert form.columns(model)["ids"].dtype == kept
    store = store_of(model, examples, tmp_path / "rows")
    tokens = sum(len(example.answer_ids) for example in examples)
    assert (store.tokens, store.bytes_per_token) == (tokens, size)
    (path,) = (tmp_path / "rows").glob("rows-*")
    assert 0 < path.stat().st_size - tokens * size <= 200
    names = {path.name for path in (tmp_path / "rows").iterdir()}
    assert names == {path.name, INDEX, "store.json"}, "no head is kept"
    if vocabulary != V:
        ids = store.for_batch(Batch(tuple(examples))).ids
        assert (ids[:, 0] == vocabulary - 1).all()


def test_a_flipped_byte_is_found(examples, tmp_path):
    folder = tmp_path / "rows"
    store_of(make_student("lora"), examples, folder)
    path = folder / "rows-000000.safetensors"
    size = path.stat().st_size
    for at in (0, 20, size // 3, size // 2, size - 1):
        flip(path, at)
        with pytest.raises(UserError, match=r"rows-000000\.safetensors: got "):
            TeacherStore(folder, verify=True)
        flip(path, at)
    TeacherStore(folder, verify=True)


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    "case",
    [
        Case("lora", accumulate=2),
        Case("full", tied=False),
        Case("full", combine="pcgrad"),
        Case("lora, head too", tied=False, shard=1),
    ],
    ids=str,
)
def test_two_ranks_make_the_bytes_of_one_and_train_alike(two, case, tmp_path):
    whole = cut_topk.run(case._replace(accumulate=1, shard=None), tmp_path / "one", alone=True)
    found = two.run(cut_topk.run, case, tmp_path / "two")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("rows-*"))) > 3
    assert_equal(found[0], whole)


def recipe_of(config, **changes):
    """The same recipe by best ids on disk."""
    settings = {"cache": "topk", "topk": K, "cache_folder": config.output.with_name("teacher")}
    kl = ObjectiveConfig(loss="topk_kl", options={"reverse": 0.5})
    objectives = {
        **dict.fromkeys(config.objectives, kl),
        "retain": ObjectiveConfig(loss="cross_entropy"),
    }
    teacher = replace(config.teacher, **{**settings, **changes})
    return replace(config, teacher=teacher, objectives=objectives)


class TeacherRan(Exception):
    """Somebody asked for the teacher."""


@pytest.fixture
def no_teacher(monkeypatch):
    """From now on no teacher is loaded, reads anything or computes anything."""

    def forbid():
        def raising(*args, **kwargs):
            raise TeacherRan

        monkeypatch.setattr(Batch, "teacher", raising)
        monkeypatch.setattr(teacher_model, "load", raising)
        for name in ("adapters_off", "own_rows", "base_rows"):
            monkeypatch.setattr(models, name, raising)

    return forbid


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["base", "frozen"])
def test_training_never_loads_a_teacher_that_is_on_disk(config, make, kind, tmp_path, no_teacher):
    config = recipe_of(make(config), kind=kind)
    first = train.main(config)
    log = (config.output / "train_log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < 0.9 * losses[0]
    no_teacher()
    assert weights_of(train.main(in_folder(config, tmp_path / "again"))) == weights_of(first)
    elsewhere = replace(config.teacher, cache_folder=tmp_path / "elsewhere")
    other = replace(in_folder(config, tmp_path / "other"), teacher=elsewhere)
    with pytest.raises(TeacherRan):  # whoever has no store needs the teacher
        train.main(other)


@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_a_run_resumes_from_the_store(config, make, tmp_path, no_teacher, monkeypatch):
    config = recipe_of(make(config))
    whole = train.main(in_folder(config, tmp_path / "whole"))
    no_teacher()
    original = train.train_step

    def stopping(*arguments):
        if arguments[6] == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    assert weights_of(train.main(config, resume=True)) == weights_of(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_and_memory_train_alike(config, tmp_path, dtype):
    """By ids chosen from hidden rows in memory, in each step."""
    config = recipe_of(full(config))
    config = replace(config, model=replace(config.model, dtype=dtype))
    kl = ObjectiveConfig(loss="topk_kl", options={"reverse": 0.5, "k": K})
    memory = replace(
        in_folder(config, tmp_path / "memory"),
        teacher=replace(config.teacher, cache="memory"),
        objectives={**dict.fromkeys(config.objectives, kl), "retain": config.objectives["retain"]},
    )
    logs = []
    for one in (config, memory):
        train.main(one)
        logs.append((one.output / "train_log.jsonl").read_text().splitlines())
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_another_model_teaches_by_its_best_ids(config, other_dir):
    """Of another width, with scaled logits, and ids that the student does not have."""
    config = recipe_of(config, kind="frozen", path=str(other_dir), topk=300)
    ready = prepare(config, World())
    (part,) = next(iter(ready.loader))[0].parts
    rows = ready.teacher.rows(part)
    teacher, taught = GraniteForCausalLM.from_pretrained(other_dir).eval(), []
    for example in part.examples:
        with torch.no_grad():
            taught.append(logits_of(teacher, example.teacher, example.answer_ids)[:, :V])
    expected = torch.cat(taught).log_softmax(-1)
    assert rows.ids.shape[1] == V
    empty = empty_model(teacher_model.settings(config), frozen=True)
    assert BestIds(config, empty, Tracker(FakeTensorMode())).k == V, "what plan counts"
    error = (rows.values - expected.gather(1, rows.ids)).abs()
    assert (error <= 2e-4 + 2 * ROUNDING * expected.abs().amax(-1, keepdim=True)).all()
    assert (error.mean(-1) < 0.01).all()


def test_the_command_says_what_a_token_takes(config, tmp_path, capsys, no_teacher):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_dict(recipe_of(config))))
    assert cli.main(["teacher-cache", str(path), "--check"]) == 2
    capsys.readouterr()
    assert cli.main(["teacher-cache", str(path)]) == 0
    assert f" answer tokens, {4 * K + 2} bytes each" in capsys.readouterr().out
    assert cli.main(["teacher-cache", str(path), "--check"]) == 0
    (folder,) = (tmp_path / "teacher").iterdir()
    flip(folder / "rows-000000.safetensors", -1)
    assert cli.main(["teacher-cache", str(path), "--check"]) == 2
    assert "rows-000000.safetensors: got sha256" in capsys.readouterr().err
    assert cli.main(["teacher-cache", str(path)]) == 0
    no_teacher()
    train.main(recipe_of(config))


CHANGES = {
    "number": {"topk": K + 1},
    "kind of store": {"cache": "disk"},
    "context": {"contexts": {}},
    "ids of the student": None,
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=list(CHANGES))
def test_whatever_changes_the_store_changes_its_name(config, tokenizer, other_dir, changes):
    config = recipe_of(config, kind="frozen", path=str(other_dir))
    before = folder_of(config, tokenizer)
    if changes is None:  # the student has all of the teacher's ids, which then count
        other = replace(config, model=replace(config.model, path=str(other_dir)))
    else:
        other = replace(config, teacher=replace(config.teacher, **changes))
    assert folder_of(other, tokenizer) != before
    assert folder_of(replace(config, steps=99), tokenizer) == before


def folder_of(config, tokenizer):
    from tests.trainer.test_teacher_store import folder_of

    return folder_of(config, tokenizer)


KL = ObjectiveConfig(loss="bidirectional_kl")
WIDE = ObjectiveConfig(loss="topk_kl", options={"k": K + 1})
REFUSED = {
    "another loss": (
        {}, {"neighbor": KL},
        "objectives.neighbor.loss: got bidirectional_kl with teacher.cache topk, which keeps no "
        "hidden rows, expected topk_kl or a loss without a teacher; ",
    ),
    "more ids": (
        {}, {"forget": WIDE},
        "objectives.forget.options: k: got 9, expected at most teacher.topk, 8; ",
    ),
    "rows that change": (
        {"kind": "ema"}, {},
        "teacher.cache: got topk with teacher.kind ema, whose rows change with every step",
    ),
    "no ids": (
        {"cache": "memory"}, {"forget": ObjectiveConfig(loss="topk_kl", options={"k": 0})},
        "objectives.forget.options: k: got 0",
    ),
    "ids in words": (
        {}, {"forget": ObjectiveConfig(loss="topk_kl", options={"k": "abc"})},
        "objectives.forget.options: k: got 'abc', expected a whole number",
    ),
    "an unknown tail": (
        {}, {"forget": ObjectiveConfig(loss="topk_kl", options={"tail": "cut"})},
        "objectives.forget.options: tail: got 'cut'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("teacher", "objectives", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused_in_one_line(config, teacher, objectives, message):
    config = recipe_of(config, **teacher)
    config = replace(config, objectives={**config.objectives, **objectives})
    with pytest.raises(UserError) as caught:
        train.main(config)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()
    if config.teacher.cache == "topk":
        with pytest.raises(UserError) as caught:
            teacher_cache.main(config)
        assert str(caught.value).startswith(message)
        assert not config.teacher.cache_folder.exists()
        with pytest.raises(UserError) as caught:
            planned(config)
        assert str(caught.value).startswith(message)


def planned(config):
    plan.main(config, ranks=1, memory_gib=1.0, target="cpu")


def test_more_ids_than_the_vocabulary_are_all_of_them(config, tmp_path):
    """Both the number that is kept and the one that counts."""
    wide = V + 42
    whole = replace(recipe_of(config, topk=wide), steps=2)
    kl = ObjectiveConfig(loss="topk_kl", options={"reverse": 0.5, "k": wide})
    asked = {**dict.fromkeys(whole.objectives, kl), "retain": whole.objectives["retain"]}
    asked = replace(in_folder(whole, tmp_path / "asked"), objectives=asked)
    planned(asked)
    folder = teacher_cache.main(asked)
    (rows,) = folder.glob("rows-*")
    assert load_file(rows)["ids"].shape[1] == V
    assert weights_of(train.main(asked)) == weights_of(train.main(whole))

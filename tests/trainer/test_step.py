"""A packed, fused step against the same thing done plainly: one example at a time, whole logits.

Everything runs in fp64, where a wrong row, weight or divisor shows at once and rounding does not.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bidistill.attention import use_packed_attention
from bidistill.config import LoraSettings, ObjectiveConfig
from bidistill.data.loader import Batch
from bidistill.data.records import ROLES, Role
from bidistill.data.views import Message, build_examples
from bidistill.errors import UserError
from bidistill.models import adapters_off, add_adapter, attach_distill_step
from bidistill.objectives import Objectives, needs_teacher
from bidistill.teacher.compute import HiddenCache
from bidistill.teacher.rows import TeacherRows
from tests.trainer.tiny import SHOTS, make_model, randomise_adapters

CONTEXTS: dict[Role, Sequence[Message]] = {"forget": SHOTS, "adversarial": SHOTS}
KL = ObjectiveConfig(loss="bidirectional_kl", options={"forward": 0.25, "reverse": 0.75})
OBJECTIVES: dict[Role, ObjectiveConfig] = {
    "forget": KL,
    "neighbor": ObjectiveConfig(loss="cross_entropy", weight=0.5),
    "retain": ObjectiveConfig(loss="jsd", options={"beta": 0.25}, weight=2.0),
    "adversarial": ObjectiveConfig(
        loss="bidirectional_kl", options=KL.options, weight=4.0, positions="first"
    ),
}


@pytest.fixture
def batch(records, tokenizer) -> Batch:
    examples = build_examples(records, tokenizer, CONTEXTS)
    return Batch(tuple(examples[i] for i in (0, 7, 3, 1, 9, 6, 4)))


def make_student(kind) -> Any:
    """A student in fp64 that differs from its teacher."""
    model = make_model(tied=kind != "full, untied")
    if kind == "lora":
        model = add_adapter(model, LoraSettings(rank=2))
        randomise_adapters(model)
    model = model.double()
    attach_distill_step(model)
    return model


def loss_of_row(objective, s, t, target):
    """One row's loss, straight from its definition. Shapes: s, t (V,)."""
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    if objective.loss == "cross_entropy":
        return -log_s[target]
    if objective.loss == "jsd":
        beta = objective.options["beta"]
        log_m = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
        to_teacher = (log_t.exp() * (log_t - log_m)).sum()
        return beta * to_teacher + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum()
    forward = (log_t.exp() * (log_t - log_s)).sum()
    return 0.25 * forward + 0.75 * (log_s.exp() * (log_s - log_t)).sum()


def logits_of(model, view, answer_ids):
    """Logits that predict the answer, from an unpacked run of one sequence."""
    ids = torch.tensor([[*view.prompt_ids, *answer_ids]])
    return model(input_ids=ids, use_cache=False).logits[0, len(view.prompt_ids) - 1 : -1]


def plain_step(model, teacher, batch):
    """Loss, and per-role means, without packing and without fusing."""
    total, rows, by_role = torch.zeros((), dtype=torch.float64), 0, {}
    for example in batch.examples:
        objective = OBJECTIVES[example.role]
        student_logits = logits_of(model, example.student, example.answer_ids)
        with torch.no_grad(), adapters_off(teacher):
            teacher_logits = logits_of(teacher, example.teacher, example.answer_ids)
        kept = 1 if objective.positions == "first" else len(example.answer_ids)
        for j in range(kept):
            row = loss_of_row(
                objective, student_logits[j], teacher_logits[j], example.answer_ids[j]
            )
            total = total + objective.weight * row
            rows += 1
            by_role.setdefault(example.role, []).append(row.item())
    return total / rows, {role: sum(x) / len(x) for role, x in by_role.items()}


def fused_step(model, batch, teacher):
    student = batch.student()
    loss = Objectives(OBJECTIVES).for_step(batch.examples, student)
    return loss, model.distill_step(student, loss, teacher)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["lora", "full, tied", "full, untied"])
def test_equals_a_plain_step(batch, kind):
    model, teacher = make_student(kind), make_student(kind)
    cache = HiddenCache(model, batch.examples)
    if kind != "lora":  # the student has moved on, its teacher has not
        for student_p, teacher_p in zip(model.parameters(), teacher.parameters(), strict=True):
            student_p.data.add_(0.05 * torch.randn_like(teacher_p))
    loss, result = fused_step(model, batch, cache.for_batch(batch))
    result.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    plain, means = plain_step(model, teacher, batch)
    plain.backward()
    torch.testing.assert_close(result.loss, plain, rtol=1e-7, atol=0)
    expected = gradients(model)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-4, f"{name}: a gradient of zero proves nothing"
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-7 * scale, msg=name)
    ratios = zip(ROLES, result.role_sums.tolist(), loss.role_counts, strict=True)
    assert {r: s / n for r, s, n in ratios if n} == pytest.approx(means, rel=1e-6)


def test_cache_equals_live_teacher(batch):
    model = make_student("lora")
    cache = HiddenCache(model, batch.examples).for_batch(batch)
    live = fused_step(model, batch, batch.teacher())[1].loss
    live.backward()
    expected = gradients(model)
    model.zero_grad()
    kept = fused_step(model, batch, cache)[1].loss
    kept.backward()
    torch.testing.assert_close(kept, live, rtol=1e-9, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-12)
    # and another teacher would show
    cache.hidden = cache.hidden.roll(1, 0)
    assert abs(fused_step(model, batch, cache)[1].loss - live) > 1e-2


def test_cache_chunks_do_not_matter(batch, monkeypatch):
    model = make_student("lora")
    whole = HiddenCache(model, batch.examples).for_batch(batch).hidden
    monkeypatch.setattr("bidistill.teacher.compute.CHUNK_TOKENS", 60)
    parts = HiddenCache(model, batch.examples).for_batch(batch).hidden
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-10)


def test_frozen_head_is_copied_only_if_the_head_trains(batch):
    assert HiddenCache(make_student("lora"), batch.examples).weight is None
    model = make_student("full, tied")
    cache = HiddenCache(model, batch.examples)
    assert cache.weight is not None
    before = cache.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    torch.testing.assert_close(cache.weight, before, rtol=0, atol=0)


def test_every_adapter_moves(batch):
    model = make_student("lora")
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    fused_step(model, batch, batch.teacher())[1].loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter != start[name]).all(), name
        else:
            assert parameter.grad is None, name


def test_fresh_adapters_move_on_their_b_side(batch):
    model: Any = add_adapter(make_model(), LoraSettings(rank=2))
    attach_distill_step(model)
    fused_step(model, batch, batch.teacher())[1].loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == (".lora_B." in name), name


def test_roles_with_one_loss_share_a_call():
    terms = Objectives(OBJECTIVES).terms
    assert [term.roles for term in terms] == [("forget", "adversarial"), ("neighbor",), ("retain",)]


def test_a_step_without_a_teacher(batch):
    model = make_student("lora")
    objectives = Objectives({r: ObjectiveConfig(loss="cross_entropy") for r in OBJECTIVES})
    assert not needs_teacher(objectives.configs)
    student = batch.student()
    result = model.distill_step(student, objectives.for_step(batch.examples, student), None)
    nll = [
        -logits_of(model, e.student, e.answer_ids).log_softmax(-1)[range(n), list(e.answer_ids)]
        for e in batch.examples
        if (n := len(e.answer_ids))
    ]
    torch.testing.assert_close(result.loss, torch.cat(nll).mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            ObjectiveConfig(loss="bidirectional_kl", options={"foward": 1.0}),
            "objectives.retain.options: got 'foward'.*did you mean 'forward'",
        ),
        (
            ObjectiveConfig(loss="jsd", options={"reduction": "sum"}),
            "objectives.retain.options: got 'reduction', which is no option of jsd",
        ),
        (
            ObjectiveConfig(loss="jsd", options={"beta": 1.5}),
            "objectives.retain.options: beta: got 1.5",
        ),
        (
            ObjectiveConfig(loss="push_pull", options={"reading": "hing"}),
            "objectives.retain.options: reading: got 'hing'",
        ),
    ],
)
def test_options_are_checked_before_training(objective, message):
    with pytest.raises(UserError, match=message):
        Objectives({"retain": objective})


def test_teacher_rows_are_opaque_to_tree_walks():
    rows = TeacherRows(torch.ones(2, 3))
    assert tree_leaves([{"teacher": rows}]) == [rows]


def test_packed_attention_is_off_outside_the_step(batch):
    model = make_student("lora")
    fused_step(model, batch, batch.teacher())
    assert model.config._attn_implementation == "sdpa"
    with use_packed_attention(model.get_base_model()):
        assert model.config._attn_implementation != "sdpa"

"""Combiners: by hand, against the algorithms to the letter, and in training.

Properties: what a combiner computes from the inner products is what the published algorithm does on
vectors; MGDA's direction hurts nobody and no other point of the hull is shorter; it does not matter
how the parameters are cut into tensors, or into shards; ``sum`` is the ordinary backward pass.
"""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from bidistill import combine, gradients, train
from bidistill.combine import mgda, ngdiff, pcgrad
from bidistill.data import records
from bidistill.data.loader import Batch
from bidistill.data.views import build_examples
from bidistill.gradients import cosines, gram, role_gradients
from bidistill.objectives import Objectives, StepResult
from bidistill.teacher.compute import HiddenCache
from tests.trainer.test_step import CONTEXTS, OBJECTIVES, make_student
from tests.trainer.test_train import full, log_of, weights_of

ROLES = ("forget", "neighbor", "retain", "adversarial")
OTHERS = ("pcgrad", "mgda", "ngdiff")
SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


def vectors(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def gram_of(rows):
    return rows @ rows.T


@st.composite
def several(draw, most=5):
    """One to five vectors, from dependent to independent, of lengths four orders apart."""
    count, width = draw(st.integers(1, most)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    exponents = draw(st.lists(st.integers(-4, 0), min_size=count, max_size=count))
    rows *= 10.0 ** torch.tensor(exponents)[:, None]
    common = draw(st.sampled_from([0.0, 1.0, 5.0]))  # with a large one nobody conflicts
    return rows + common * rows.norm(dim=1, keepdim=True) * torch.eye(1, width)


class Fixed:
    """Goes through the others in the order of their numbers."""

    def sample(self, others, count):
        assert len(others) == count
        return sorted(others)


# g_1 = (1, 0), g_2 = (-1, 1): <g_1, g_2> = -1, |g_2|^2 = 2
# h_1 = g_1 + g_2 / 2 = (1/2, 1/2), h_2 = g_2 + g_1 = (0, 1), sum (1/2, 3/2)
CONFLICT = vectors([1, 0], [-1, 1])


def test_pcgrad_by_hand():
    assert pcgrad(gram_of(CONFLICT), random.Random(0)).tolist() == [2.0, 1.5]
    agreeing = vectors([1, 0], [1, 1])
    assert pcgrad(gram_of(agreeing), random.Random(0)).tolist() == [1, 1]


def test_pcgrad_looks_at_what_earlier_projections_left():
    """h_1 = (2, 0) meets (-1, 1) and becomes (1, 1), and now goes against (0, -1) too: (1, 0)."""
    rows = vectors([2, 0], [-1, 1], [0, -1])
    h_2 = vectors([0, 1]) * 0 + vectors([-1, 1]) + vectors([1, 0])  # off g_1: (0, 1)
    h_2 = h_2 + vectors([0, -1])  # off g_3: (0, 0)
    h_3 = vectors([0, -1]) + vectors([-0.5, 0.5])  # off g_2: (-1/2, -1/2); g_1 was no conflict
    expected = vectors([1, 0]) + h_2 + h_3
    weights = pcgrad(gram_of(rows), Fixed())  # type: ignore
    torch.testing.assert_close(weights @ rows, expected[0])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0], [0, 1]], [0.5, 0.5]),
        ([[1, 0], [0, 2]], [0.8, 0.2]),  # (g_2 - g_1) . g_2 / |g_1 - g_2|^2 = 4/5
        ([[1, 0], [3, 1]], [1, 0]),  # the shorter one is closest already
        ([[1, 1], [-1, -1]], [0.5, 0.5]),
        ([[3, 0, 0], [0, 3, 0], [0, 0, 3]], [1 / 3] * 3),
        ([[1, 0], [0, 1], [2, 2]], [0.5, 0.5, 0]),  # the third is no help
        ([[2, 1], [-2, 1], [0, 5]], [0.5, 0.5, 0]),
        ([[1, 0], [0, 1], [1e-7, 0]], [0.5, 0.5, 0]),  # negligible: left out
    ],
)
def test_mgda_by_hand(rows, expected):
    weights = mgda(gram_of(vectors(*rows)))
    torch.testing.assert_close(weights, vectors(expected)[0], rtol=0, atol=1e-12)


def test_ngdiff_by_hand():
    """Keep: (0, 4) + (3, 0), length 5. Forget: (0, -2) + (0, -6), length 8."""
    rows = vectors([0, -2], [0, 4], [3, 0], [0, -6])
    weights = ngdiff(gram_of(rows), [True, False, False, True])
    assert weights.tolist() == pytest.approx([1 / 8, 1 / 5, 1 / 5, 1 / 8], rel=1e-15)
    named = combine.weights("ngdiff", gram_of(rows), ROLES, "")
    assert named == weights.tolist()


def test_ngdiff_of_one_group_is_its_unit_vector():
    rows = vectors([3, 0], [0, 4])
    torch.testing.assert_close(ngdiff(gram_of(rows), [True, True]) @ rows, vectors([0.6, 0.8])[0])


def test_ngdiff_leaves_out_a_group_that_cancels_itself():
    rows = vectors([1, 0], [0.3, 0.1], [-0.3, -0.1])
    assert ngdiff(gram_of(rows), [True, False, False]).tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", OTHERS)
def test_a_single_role_keeps_its_direction(name):
    row = vectors([3, 4])
    (weight,) = combine.weights(name, gram_of(row), ["retain"], "")
    assert weight == pytest.approx({"pcgrad": 1, "mgda": 1, "ngdiff": 0.2}[name])


@pytest.mark.parametrize("name", OTHERS)
def test_a_zero_gradient_changes_nothing(name):
    """The direction is the one of the other roles alone."""
    rows = vectors([1, 0], [-1, 1], [0, 0])
    roles = ("forget", "neighbor", "retain")
    with_zero = combine.weights(name, gram_of(rows), roles, "seed")
    without = combine.weights(name, gram_of(rows[:2]), roles[:2], "seed")
    torch.testing.assert_close(vectors(with_zero) @ rows, vectors(without) @ rows[:2])


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("count", [1, 3])
def test_all_gradients_zero(name, count):
    weights = combine.weights(name, gram_of(torch.zeros(count, 2).double()), ROLES[:count], "")
    assert all(map(math.isfinite, weights))


@pytest.mark.parametrize("name", OTHERS)
def test_not_finite_is_left_to_the_caller(name):
    broken = gram_of(vectors([1, 0], [math.nan, 1]))
    assert combine.weights(name, broken, ROLES[:2], "") == [1, 1]


def literal_pcgrad(rows, draw):
    """Algorithm 1 of Yu et al., vector by vector."""
    total = torch.zeros_like(rows[0])
    for k, row in enumerate(rows):
        h = row.clone()
        for other in draw.sample([i for i in range(len(rows)) if i != k], len(rows) - 1):
            if (product := h @ rows[other]) < 0:
                h -= product / rows[other].square().sum() * rows[other]
        total += h
    return total


@SETTINGS
@given(several(), st.integers(0, 99))
def test_pcgrad_is_the_algorithm_on_vectors(rows, seed):
    weights = pcgrad(gram_of(rows), random.Random(seed))
    expected = literal_pcgrad(rows, random.Random(seed))
    scale = rows.norm(dim=1).max().item()
    torch.testing.assert_close(weights @ rows, expected, rtol=0, atol=1e-9 * scale)


@SETTINGS
@given(several())
def test_pcgrad_without_conflict_is_the_sum(rows):
    rows = rows.abs()
    assert pcgrad(gram_of(rows), random.Random(0)).tolist() == [1] * len(rows)


@SETTINGS
@given(several())
def test_mgda_is_the_shortest_and_hurts_nobody(rows):
    """For a convex problem the second property implies the first; both are looked at."""
    weights = mgda(gram_of(rows))
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    direction = weights @ rows
    scale = rows.norm(dim=1).max().item()
    active = rows.norm(dim=1) > gradients.NEGLIGIBLE * scale
    products = (rows @ direction)[active]
    assert products.min() >= direction.square().sum() - 1e-9 * scale**2
    corners = torch.distributions.Dirichlet(torch.full((len(rows),), 0.3)).sample((300,)).double()
    others = (corners * active) / (corners * active).sum(1, keepdim=True).clamp(min=1e-30) @ rows
    kept = (corners * active).sum(1) > 1e-3
    assert (others[kept].norm(dim=1) >= direction.norm() - 1e-9 * scale).all()


@pytest.mark.parametrize("seed", range(12))
def test_mgda_agrees_with_a_solver(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 + seed % 4, 3 + seed % 3, generator=generator, dtype=torch.float64)
    matrix = gram_of(rows).numpy()
    found = minimize(
        lambda w: w @ matrix @ w, np.full(len(rows), 1 / len(rows)),
        jac=lambda w: 2 * matrix @ w, bounds=[(0, 1)] * len(rows), method="SLSQP",
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-15},
    )  # fmt: skip
    weights = mgda(gram_of(rows)).numpy()
    assert weights @ matrix @ weights == pytest.approx(found.fun, abs=1e-7)


@SETTINGS
@given(several(), st.data())
def test_mgda_and_ngdiff_do_not_depend_on_order(rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    forgetting = [i % 2 == 0 for i in range(len(rows))]
    for combiner in (mgda, lambda g, f=forgetting: ngdiff(g, [f[i] for i in order])):
        shuffled = combiner(gram_of(rows[order])) @ rows[order]
        if combiner is not mgda:
            combiner = lambda g: ngdiff(g, forgetting)  # noqa: E731
        scale = max(1.0, rows.norm(dim=1).max().item())
        expected = combiner(gram_of(rows)) @ rows
        torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-6 * scale)


@SETTINGS
@given(several(), st.data())
def test_how_parameters_are_cut_does_not_matter(rows, data):
    width = rows.shape[1]
    inner = data.draw(st.lists(st.integers(0, width), max_size=4))
    cuts = [0, *sorted(inner), width]
    pieces = [[row[a:b] for a, b in pairwise(cuts)] for row in rows]
    scale = rows.square().sum().item()
    torch.testing.assert_close(gram(pieces), gram_of(rows), rtol=0, atol=1e-12 * scale)


def test_gram_of_tensors_of_any_shape(monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 4)
    torch.manual_seed(0)
    whole = [[torch.randn(3, 5), torch.randn(2, 3).T, torch.randn(())] for _ in range(3)]
    flat = torch.stack([torch.cat([t.reshape(-1) for t in one]) for one in whole]).double()
    torch.testing.assert_close(gram(whole), flat @ flat.T, rtol=1e-12, atol=1e-12)


def test_gram_takes_a_missing_gradient_for_zero():
    one, other = torch.tensor([3.0]), torch.tensor([4.0])
    found = gram([[one, None, None], [other, other, None]])
    assert found.tolist() == [[9, 12], [12, 32]]
    assert gram([[None], [None]]).tolist() == [[0, 0], [0, 0]]


def test_gram_is_exact_where_fp32_is_not():
    """2^24 + 1 is no fp32 number."""
    one = torch.tensor([4096.0, 1.0])
    assert gram([[one]]).item() == 2**24 + 1


def test_cosines():
    found = cosines(gram_of(vectors([3, 0], [1, 1], [-2, 0], [1e-7, 0])))
    half = math.sqrt(0.5)
    expected = vectors([1, half, -1], [half, 1, -half], [-1, -half, 1])
    torch.testing.assert_close(found[:3, :3], expected)
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()


@SETTINGS
@given(several())
def test_cosine_with_itself_is_one(rows):
    own = cosines(gram_of(rows)).diagonal()
    torch.testing.assert_close(own[~own.isnan()], torch.ones_like(own[~own.isnan()]))


@pytest.fixture
def batch(records, tokenizer):
    examples = build_examples(records, tokenizer, CONTEXTS)
    return Batch(tuple(examples[i] for i in (0, 7, 3, 1, 9, 6, 4)))


def step_of(model, batch, apart=()):
    student = batch.student()
    loss = Objectives(OBJECTIVES, apart=apart).for_step(batch.examples, student)
    return model.distill_step(student, loss, batch.teacher())


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_role_losses_add_up_and_are_the_roles_own(batch):
    model = make_student("lora")
    fused, apart = step_of(model, batch), step_of(model, batch, ROLES)
    assert tuple(apart.role_losses) == ROLES
    assert not fused.role_losses
    assert torch.equal(torch.stack(list(apart.role_losses.values())).sum(), apart.loss)
    torch.testing.assert_close(apart.loss, fused.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(apart.role_sums, fused.role_sums)
    rows = Objectives(OBJECTIVES).for_step(batch.examples, batch.student()).divisor
    sums = dict(zip(records.ROLES, apart.role_sums.tolist(), strict=True))
    assert sums["gold"] == 0
    for role in ROLES:
        weighted = OBJECTIVES[role].weight * sums[role] / rows  # type: ignore
        assert apart.role_losses[role].item() == pytest.approx(weighted, rel=1e-6)


def test_role_gradients_add_up_to_the_whole(batch):
    model = make_student("full, untied")
    step_of(model, batch).loss.backward()
    whole = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    parts = role_gradients(step_of(model, batch, ROLES).role_losses.values(), trained(model))
    assert all(p.grad is None for p in trained(model))
    for expected, each in zip(whole, zip(*parts, strict=True), strict=True):
        scale = expected.abs().max().item()
        assert scale > 1e-6
        torch.testing.assert_close(sum(each), expected, rtol=0, atol=1e-6 * scale)


def test_a_role_without_rows_has_a_zero_loss(batch):
    """Ranks that share a step need not have rows of each role, and still go backward together."""
    model = make_student("full, untied")
    some = Batch(tuple(e for e in batch.examples if e.role != "retain"))
    losses = step_of(model, some, ROLES).role_losses
    assert losses["retain"].item() == 0
    parts = role_gradients(losses.values(), trained(model))
    assert all(part is not None and not part.any() for part in parts[2])
    assert all(part is not None for each in parts for part in each)


def test_sum_is_one_backward_to_the_bit(batch):
    model = make_student("lora")
    step_of(model, batch).loss.backward()
    expected = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    passes = []
    result = step_of(model, batch)
    result.loss.register_hook(passes.append)
    assert combine.backward([result], trained(model), "sum", "") == {}
    assert len(passes) == 1
    for parameter, gradient in zip(trained(model), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", OTHERS)
def test_backward_writes_the_combination(batch, name):
    model = make_student("lora")
    parts = role_gradients(step_of(model, batch, ROLES).role_losses.values(), trained(model))
    rows = torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in parts])  # type: ignore
    factors = combine.weights(name, gram_of(rows), ROLES, "7/3")
    logged = combine.backward([step_of(model, batch, ROLES)], trained(model), name, "7/3")
    found = torch.cat([p.grad.reshape(-1) for p in trained(model)])
    expected = vectors(factors)[0] @ rows
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert (expected - rows.sum(0)).norm() > 1e-3 * expected.norm(), "it is the sum: no proof"
    assert len(logged) == 6
    expected = cosines(gram_of(rows))[0, 2].item()
    assert logged["forget", "retain"] == pytest.approx(expected, abs=1e-9)


def test_a_parameter_that_no_loss_touches_keeps_no_gradient():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    losses = {"forget": used.sum(), "retain": (used * torch.tensor([1.0, -3.0])).sum()}
    result = StepResult(losses["forget"], torch.zeros(4), losses)  # type: ignore
    combine.backward([result], [used, unused], "pcgrad", "")
    assert unused.grad is None  # AdamW would decay it otherwise
    # g = (1, 1), (1, -3): <,> = -2; h = (1.2, 0.4) and (2, -2)
    torch.testing.assert_close(used.grad, torch.tensor([3.2, -1.6]))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("make", [lambda c: c, full], ids=["lora", "full"])
def test_a_run_learns_and_logs_cosines(config, name, make):
    config = replace(make(config), combine=name, steps=12)
    train.main(config)
    log = log_of(config)
    slow = name == "mgda"  # whoever is nearly there has the say
    assert log[-1]["loss/forget"] < (0.95 if slow else 0.8) * log[0]["loss/forget"]
    assert all(entry["skipped"] == 0 for entry in log)
    pairs = [f"cosine/{a}/{b}" for i, a in enumerate(ROLES) for b in ROLES[i + 1 :]]
    for entry in log:
        assert [key for key in entry if key.startswith("cosine/")] == pairs
        assert all(entry[p] is None or -1 <= entry[p] <= 1 for p in pairs)
    # student and teacher of a role without a context are one at first
    assert log[0]["cosine/neighbor/retain"] is None
    assert isinstance(log[-1]["cosine/neighbor/retain"], float)


@pytest.mark.parametrize("name", OTHERS)
def test_combiners_differ_from_the_sum(config, tmp_path, name):
    plain = weights_of(train.main(replace(config, output=tmp_path / "sum")))
    other = weights_of(train.main(replace(config, combine=name, output=tmp_path / name)))
    assert plain != other


def test_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    """The order that PCGrad draws is a function of the seed and the step."""
    config = replace(config, combine="pcgrad")
    whole = weights_of(train.main(replace(config, output=tmp_path / "whole")))
    original = train.train_step

    def dying(*arguments):
        if arguments[6] == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    assert weights_of(train.main(config, resume=True)) == whole


def test_the_seed_orders_pcgrad():
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {json.dumps(combine.weights("pcgrad", gram_of(rows), ROLES, f"0/{s}")) for s in (1, 2)}
    again = json.dumps(combine.weights("pcgrad", gram_of(rows), ROLES, "0/1"))
    assert len(found) == 2
    assert again in found


def test_a_poisoned_role_skips_the_step(config, monkeypatch):
    original = HiddenCache.for_batch

    def poisoned(self, batch):
        rows = original(self, batch)
        rows.hidden[0, 0] = torch.nan
        return rows

    monkeypatch.setattr(HiddenCache, "for_batch", poisoned)
    config = replace(config, combine="mgda", steps=2)
    train.main(config)
    assert [entry["skipped"] for entry in log_of(config)] == [1, 1]

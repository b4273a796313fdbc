"""Losses of the published methods against the published formulas, written out on whole logits.

fp64 throughout. Properties: value and gradients; finite differences; rows that do not count change
nothing; the floor and the ceiling of each; what becomes of NPO as beta goes to zero.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bidistill.baselines.answers import Answers
from bidistill.baselines.flat import flat
from bidistill.baselines.gradient_ascent import gradient_ascent
from bidistill.baselines.npo import npo
from bidistill.baselines.rmu import direction, rmu
from bidistill.baselines.simnpo import simnpo
from bidistill.baselines.unlikelihood import unlikelihood
from bidistill.config import ObjectiveConfig
from bidistill.data.loader import Batch
from bidistill.data.views import build_examples
from bidistill.loss_names import BUILT_IN
from bidistill.losses import LOSSES, find
from bidistill.models import attach_distill_step
from bidistill.objectives import Objectives
from bidistill.teacher.rows import TeacherRows
from tests.baselines.conftest import gold_records, other_records
from tests.trainer.tiny import make_model

EXACT = 1e-10
H, V = 5, 23


class Published(NamedTuple):
    """A formula: of one answer's probabilities under student and base model, from its paper."""

    loss: str
    options: dict[str, Any]
    value: Callable[[Tensor, Tensor], Tensor]
    """Of log pi(y_t) and log pi_0(y_t), shape (tokens,): the answer's share of the sum."""


def f_divergence(g, f_star):
    """-g(P) for template answers, f*(g(P)) for those to forget."""
    return (lambda p, _: -g(p.exp().mean())), (lambda p, _: f_star(g(p.exp().mean())))


TV = f_divergence(lambda v: torch.tanh(v) / 2, lambda u: u)
KL = f_divergence(lambda v: v, lambda u: torch.exp(u - 1))
JS = f_divergence(
    lambda v: torch.log(2 / (1 + torch.exp(-v))), lambda u: -torch.log(2 - torch.exp(u))
)
PEARSON = f_divergence(lambda v: v, lambda u: u**2 / 4 + u)
DIVERGENCES = {"tv": TV, "kl": KL, "js": JS, "pearson": PEARSON}
PUBLISHED = [
    Published("gradient_ascent", {}, lambda p, _: p.sum()),
    Published("unlikelihood", {}, lambda p, _: -torch.log(1 - p.exp() / 2).sum()),
    Published(
        "npo",
        {"beta": 0.3},
        lambda p, b: -(2 / 0.3) * torch.log(torch.sigmoid(-0.3 * (p.sum() - b.sum()))),
    ),
    Published(  # gamma = beta delta
        "simnpo",
        {"beta": 0.75, "delta": 2.0},
        lambda p, _: -(2 / 0.75) * torch.log(torch.sigmoid(-0.75 / len(p) * p.sum() - 0.75 * 2.0)),
    ),
    *(
        Published("flat", {"side": side, "divergence": name}, formula)
        for name, both in DIVERGENCES.items()
        for side, formula in zip(("template", "forget"), both, strict=True)
    ),
]
NAMES = [f"{p.loss} {' '.join(map(str, p.options.values()))}".strip() for p in PUBLISHED]


def random(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def examples_of(tokenizer):
    """Gold answers of several lengths, and one answer of each kept role."""
    others = [r for r in other_records() if r.role in ("neighbor", "retain")]
    return build_examples([*gold_records()[:4], others[0], others[-1]], tokenizer, {})


class Case:
    """Random hidden rows and heads for a step whose gold role has the loss."""

    def __init__(self, tokenizer, loss, options, positions="answer", weight=2.5):
        batch = Batch(tuple(examples_of(tokenizer)))
        self.packed = batch.student()
        other = ObjectiveConfig(loss="cross_entropy", weight=0.5)
        gold = ObjectiveConfig(loss=loss, options=options, weight=weight, positions=positions)
        configs = {"gold": gold, "neighbor": other, "retain": other}
        self.loss = Objectives(configs).for_step(batch.examples, self.packed)
        N, vocabulary = len(self.packed.target), 258
        self.hidden = random(N, H).requires_grad_()
        self.head = random(vocabulary, H).requires_grad_()
        self.teacher = TeacherRows(random(N, H), random(vocabulary, H))
        self.sequences = [
            (self.packed.sequence == i).nonzero().squeeze(1) for i in range(len(batch.examples))
        ]
        self.roles = [example.role for example in batch.examples]

    def run(self):
        return self.loss(self.hidden, self.head, None, self.teacher)


@pytest.mark.parametrize("positions", ["answer", "first"])
@pytest.mark.parametrize("published", PUBLISHED, ids=NAMES)
def test_is_the_published_formula(tokenizer, published, positions):
    case = Case(tokenizer, published.loss, published.options, positions)
    result = case.run()
    log_p = (case.hidden @ case.head.T).log_softmax(-1)
    log_b = (case.teacher.hidden @ case.teacher.weight.T).log_softmax(-1)
    total, rows, gold = torch.zeros((), dtype=torch.float64), 0, []
    for role, at in zip(case.roles, case.sequences, strict=True):
        at = at[:1] if role == "gold" and positions == "first" else at
        target = case.packed.target[at]
        p, b = log_p[at, target], log_b[at, target]
        rows += len(at)
        if role == "gold":
            gold.append(published.value(p, b))
            total = total + 2.5 * gold[-1]
        else:
            total = total - 0.5 * p.sum()
    expected = total / rows
    torch.testing.assert_close(result.loss, expected, rtol=EXACT, atol=0)
    of_gold = result.role_sums[4]
    torch.testing.assert_close(of_gold, sum(gold).detach(), rtol=EXACT, atol=0)
    inputs = [case.hidden, case.head]
    found = torch.autograd.grad(result.loss, inputs)
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT * other.abs().max().item())


@pytest.mark.parametrize("published", PUBLISHED, ids=NAMES)
def test_finite_differences(published):
    function, sequence = find(published.loss).function, torch.tensor([0, 0, 0, 2, 2])
    nll, base = random(5).square() + 0.1, random(5).square() + 0.1

    def total(nll):
        return function(Answers.of(nll, base, sequence), **published.options)

    assert torch.autograd.gradcheck(total, nll.requires_grad_())


@pytest.mark.parametrize("side", ["forget", "keep"])
def test_rmu_is_the_published_formula(side):
    h, base = random(7, H).requires_grad_(), random(7, H)
    loss = rmu(h, base, side=side, coefficient=3.0, seed=5)
    u = direction(H, 5)
    assert u.norm().item() == pytest.approx(1, rel=1e-15)
    assert (u > 0).all()
    aim = base if side == "keep" else (3.0 * u).expand(7, H)
    torch.testing.assert_close(loss, ((h - aim) ** 2).mean(1), rtol=EXACT, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), h)
    torch.testing.assert_close(gradient, 2 * (h - aim).detach() / H, rtol=EXACT, atol=1e-15)
    assert not rmu(aim.clone(), base, side=side, coefficient=3.0, seed=5).any()
    assert not torch.equal(direction(H, 5), direction(H, 6))


UNMIXED = [p for p in BUILT_IN if p not in ("rmu", "topk_kl")]


@pytest.mark.parametrize("positions", ["answer", "first"])
@pytest.mark.parametrize("loss", UNMIXED)
def test_rows_that_do_not_count_change_nothing(tokenizer, loss, positions):
    """Rows of an answer beyond the first, where that alone counts, and rows of other roles."""
    case = Case(tokenizer, loss, {}, positions)
    before = case.run()
    counted = case.loss.counted & (case.loss.role == 4)
    others = ~counted
    assert others.any()
    (gradient,) = torch.autograd.grad(before.loss, case.hidden)
    uncounted = ~case.loss.counted
    assert uncounted.any() == (positions == "first")
    assert not gradient[uncounted].any()
    with torch.no_grad():
        case.hidden[others] = random(int(others.sum()), H, scale=9.0)
        case.teacher.hidden[others] = random(int(others.sum()), H, scale=9.0)
    after = case.run()
    assert before.role_sums[4] == after.role_sums[4]
    with torch.no_grad():  # and those that count do change it
        case.hidden[counted] += 0.5
    assert case.run().role_sums[4] != after.role_sums[4]


@pytest.mark.parametrize("loss", [*UNMIXED, "topk_kl", "rmu"])
def test_hidden_states_of_prompts_and_of_other_roles_do_not_reach_the_loss(tokenizer, loss):
    """Through a whole step: rows of the model are changed where they predict no answer token."""
    model: Any = make_model().double()
    attach_distill_step(model)
    batch = Batch(tuple(e for e in examples_of(tokenizer) if e.role == "gold"))
    packed, options = batch.student(), {"layer": 1} if loss == "rmu" else {}
    objective = ObjectiveConfig(loss=loss, options=options)
    step = Objectives({"gold": objective}).for_step(batch.examples, packed)
    place = model.model.layers[1] if loss == "rmu" else model.model.norm
    kept = torch.zeros(packed.input_ids.numel(), dtype=torch.bool)
    kept[packed.rows] = True
    assert not kept.all()

    def value(changed):
        def change(module, given, out):
            return torch.where(changed[None, :, None], out + 7 * random(*out.shape), out)

        handle = place.register_forward_hook(change)
        try:
            return model.distill_step(packed, step, batch.student()).loss.item()
        finally:
            handle.remove()

    before = value(torch.zeros_like(kept))
    assert value(~kept) == before
    assert value(kept) != before


def at_probability(p, length=3):
    nll = torch.full((length,), -math.log(p) if p else math.inf, dtype=torch.float64)
    return Answers.of(nll.requires_grad_(), torch.ones(length).double(), torch.zeros(length).long())


@pytest.mark.parametrize(
    ("function", "options", "certain", "impossible"),
    [
        (gradient_ascent, {}, 0.0, -math.inf),
        (unlikelihood, {}, 3 * math.log(2), 0.0),
        # three tokens of 1 nat under the base model
        (npo, {"beta": 0.5}, 4 * math.log1p(math.exp(1.5)), 0.0),
        (simnpo, {"beta": 0.5}, 4 * math.log(2), 0.0),
        (simnpo, {"beta": 0.5, "delta": 4.0}, 4 * math.log1p(math.exp(2)), 0.0),
        (flat, {"side": "template"}, -math.tanh(1) / 2, 0.0),
        (flat, {"side": "forget"}, math.tanh(1) / 2, 0.0),
        (flat, {"side": "forget", "divergence": "kl"}, 1.0, math.exp(-1)),
        (flat, {"side": "forget", "divergence": "pearson"}, 1.25, 0.0),
        (flat, {"side": "forget", "divergence": "js"}, math.log1p(math.e) - math.log(2), 0.0),
    ],
)
def test_floor_and_ceiling(function, options, certain, impossible):
    """The answer is all that the student says; or it never says it."""
    for p, expected in ((1.0, certain), (0.0, impossible)):
        answers = at_probability(p)
        loss = function(answers, **options).sum()
        assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        if function is not gradient_ascent and p == 0:  # it is forgotten, and left alone
            (gradient,) = torch.autograd.grad(loss, answers.nll)
            assert not gradient.any()


def test_npo_becomes_gradient_ascent():
    nll, base = random(6).square().requires_grad_(), random(6).square()
    answers = Answers.of(nll, base, torch.tensor([0, 0, 1, 1, 1, 2]))
    ascent = torch.autograd.grad(gradient_ascent(answers).sum(), nll)[0]
    errors = []
    for beta in (1e-3, 1e-5):
        found = torch.autograd.grad(npo(answers, beta=beta).sum(), nll)[0]
        errors.append((found - ascent).abs().max().item())
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)  # of first order in beta
    # and where the student is the base model, for any beta
    same = Answers.of(nll, nll.detach(), answers.answer)
    torch.testing.assert_close(torch.autograd.grad(npo(same, beta=0.7).sum(), nll)[0], ascent)


def test_simnpo_in_closed_form():
    """Two tokens of 1 and 3 nats, mean 2: gradient -2 sigmoid(-beta (2 - delta)) / 2 of each."""
    nll = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    answers = Answers.of(nll, None, torch.zeros(2).long())
    loss = simnpo(answers, beta=0.5, delta=1.0)
    assert loss.tolist() == [pytest.approx(4 * math.log1p(math.exp(-0.5)), rel=1e-14), 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), nll)
    assert gradient.tolist() == pytest.approx([-1 / (1 + math.exp(0.5))] * 2, rel=1e-14)
    assert loss[0].item() == pytest.approx(-4 * logsigmoid(torch.tensor(0.5)).item(), rel=1e-6)


def test_an_answer_counts_once_whatever_its_length():
    short = at_probability(0.5, 1)
    for length in (2, 7):
        for function in (simnpo, flat):
            assert function(at_probability(0.5, length)).sum().item() == pytest.approx(
                function(short).sum().item(), rel=1e-12
            )


def test_duet_is_push_pull_without_push(tokenizer):
    duet = Case(tokenizer, "duet", {"k": 4, "delta": 0.5})
    pull = {"k_pull": 4, "delta": 0.5, "push_weight": 0.0}
    plain = Case(tokenizer, "push_pull", pull)
    plain.hidden, plain.head, plain.teacher = duet.hidden, duet.head, duet.teacher
    assert duet.run().loss.item() == plain.run().loss.item() != 0


def test_names_and_table_agree():
    assert set(BUILT_IN) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert all(p.default is not p.empty for p in loss.options().values()), name


BAD = [
    ("npo", {"beta": 0.0}, "beta: got 0.0, expected a finite number above 0"),
    ("npo", {"betta": 1.0}, "got 'betta', which is no option of npo; did you mean 'beta'"),
    ("simnpo", {"delta": -1.0}, "delta: got -1.0, expected a finite number >= 0"),
    ("flat", {"side": "left"}, "side: got 'left', expected one of 'template', 'forget'"),
    ("flat", {"divergence": "l2"}, "divergence: got 'l2'"),
    ("rmu", {"layer": 1.5}, "layer: got 1.5, expected a whole number"),
    ("gradient_ascent", {"beta": 1.0}, "got 'beta', .* leave options out"),
    ("duet", {"k": 0}, "options: k: got 0"),
]


@pytest.mark.parametrize(("loss", "options", "message"), BAD)
def test_options_are_checked(loss, options, message):
    with pytest.raises(Exception, match=f"objectives.gold.options: .*{message}|{message}"):
        Objectives({"gold": ObjectiveConfig(loss=loss, options=options)})

"""TRL's DistillationTrainer on the fused kernels, against TRL's own and full logits in float64."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from bidistill.errors import UserError
from bidistill_kernels import LogitTransform, bidirectional_kl_reference, jsd_reference
from tests.kernels.cases import make_inputs
from tests.support import OWN_ERROR, Wide, assert_close

pytest.importorskip("trl", reason="trl is not installed")
# trl 1.16 asks transformers 5.23 for what that has renamed since
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
PRECISIONS = torch.float64, torch.float32
B, K, V = 3, 5, 150


@pytest.fixture
def ours():
    return importlib.import_module("bidistill.integrations.trl")


@pytest.fixture
def own():
    """The function of TRL that is replaced."""
    return importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss


@pytest.fixture
def example():
    return importlib.import_module("examples.trl_distillation")


def case(beta):
    """Arguments of TRL's function, and the tensors that train."""
    inputs = make_inputs(B * K, V).to(torch.float32)
    x, w, y, v, target = inputs
    bias = torch.randn(V, device=x.device, requires_grad=True)
    arguments = {
        "student_hidden_states": x.view(B, K, -1),
        "teacher_hidden_states": y.view(B, K, -1),
        "student_lm_head_weight": w,
        "teacher_lm_head_weight": v,
        "completion_mask": (target != -100).long().view(B, K),
        "beta": beta,
        "student_lm_head_bias": bias,
        "student_logit_scale": 1.3,
        "teacher_logit_scale": 0.9,
        "student_final_logit_softcapping": 9.0,
        "temperature": 1.7,
    }
    return arguments, (x, w, bias)


def from_logits(arguments, leaves, dtype, divisor):
    """Loss, entropy and gradients from full logits."""
    a = SimpleNamespace(**arguments)
    x, w, bias = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    own = LogitTransform(a.student_logit_scale, a.student_final_logit_softcapping, a.temperature)
    other = LogitTransform(a.teacher_logit_scale, None, a.temperature)
    s = own(x @ w.T + bias)
    teacher = a.teacher_hidden_states.flatten(0, 1).to(dtype), a.teacher_lm_head_weight.to(dtype)
    t = other(teacher[0] @ teacher[1].T)
    if a.beta in (0, 1):
        rows = bidirectional_kl_reference(s, t, forward=1 - a.beta, reverse=a.beta)
    else:
        rows = jsd_reference(s, t, beta=a.beta)
    counts = a.completion_mask.flatten() != 0
    loss = rows[counts].sum() / (divisor or counts.sum())
    entropy = torch.distributions.Categorical(logits=s.detach()[counts]).entropy().sum()
    return loss.detach(), entropy, *torch.autograd.grad(loss, (x, w, bias))


@BETAS
@pytest.mark.parametrize("items", [None, 40, torch.tensor(4.5)], ids=["mean", "int", "tensor"])
def test_equals_full_logits_and_trl(ours, own, beta, items):
    """TRL's function is held to the same bound, so that both are the same function."""
    arguments, leaves = case(beta)
    wanted = [from_logits(arguments, leaves, dtype, items) for dtype in PRECISIONS]
    for function in (ours.fused_divergence_loss, own):
        loss, entropy, valid = function(**arguments, num_items_in_batch=items)
        got = loss.detach(), entropy, *torch.autograd.grad(loss, leaves)
        names = "loss", "entropy", "dX", "dW", "dbias"
        for name, actual, *both in zip(names, got, *wanted, strict=True):
            assert_close(f"{function.__name__} {name}", actual, *both)
        assert valid == (arguments["completion_mask"] != 0).sum()


def test_nothing_counts(ours):
    arguments, leaves = case(0.3)
    arguments["completion_mask"] = torch.zeros_like(arguments["completion_mask"])
    loss, entropy, valid = ours.fused_divergence_loss(**arguments)
    assert not any(t.any() for t in (loss, entropy, valid, *torch.autograd.grad(loss, leaves)))


# where the two factors stand among the arguments; torch counts the operations of the first alone
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}


def multiplications(run):
    """Of all matrix products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    found = [e for e in profiler.events() if e.name in PRODUCTS]
    factors = [e.input_shapes[PRODUCTS[e.name] :][:2] for e in found]
    return sum(rows * shared * columns for (rows, shared), (_, columns) in factors)


@pytest.mark.parametrize(("beta", "theirs_in_products"), [(0.0, 6), (0.5, 8)])
def test_less_work(ours, own, beta, theirs_in_products):
    """In products of N x V x D: ours are two heads and two gradients, and the student once more
    for the entropy."""
    x, w = torch.randn(1, 64, 128), torch.randn(2048, 128)
    arguments = {
        "student_hidden_states": x.clone().requires_grad_(),
        "teacher_hidden_states": x,
        "student_lm_head_weight": w.clone().requires_grad_(),
        "teacher_lm_head_weight": w,
        "completion_mask": torch.ones(1, 64),
        "beta": beta,
    }

    def work(function, **options):
        count = multiplications(lambda: function(**arguments, **options)[0].backward())
        return round(count / (x.numel() * len(w)), 1)

    assert work(own) == theirs_in_products
    assert work(ours.fused_divergence_loss) == 5
    assert work(ours.fused_divergence_loss, entropy=False) == 4


@BETAS
def test_trainer_equals_full_logits(tmp_path, example, beta):
    """Loss and gradients of every weight of the model."""
    trainer = example.make_trainer(str(tmp_path), beta=beta, temperature=1.3)
    batch = example.make_batch()
    got = [trainer.compute_loss(trainer.model, batch)]
    got[0].backward()
    got += [p.grad for p in trainer.model.parameters()]
    wanted = []
    for dtype in PRECISIONS:
        models = [copy.deepcopy(m).to(dtype) for m in (trainer.model, trainer.teacher_model)]
        same = SimpleNamespace(model=models[0], teacher_model=models[1], beta=beta, temperature=1.3)
        models[0].zero_grad()
        with Wide() if dtype == torch.float64 else torch.enable_grad():
            loss = example.eager_loss(same, batch)
            loss.backward()
        wanted.append([loss.detach(), *(p.grad for p in models[0].parameters())])
    names = ["loss", *(name for name, _ in trainer.model.named_parameters())]
    for name, actual, *both in zip(names, got, *wanted, strict=True):
        assert_close(name, actual.detach(), *both)


@BETAS
def test_weights_of_16_bits(tmp_path, example, beta):
    """Loss and gradients as near those in float64 as TRL's own."""
    trl, batch, errors = pytest.importorskip("trl"), example.make_batch(), []
    names = "model_init_kwargs", "teacher_model_init_kwargs"
    half = {name: {"dtype": "bfloat16"} for name in names}
    for kind in (trl.DistillationTrainer, example.DistillationTrainer):
        trainer = example.make_trainer(
            str(tmp_path), loaded(kind, tmp_path), beta=beta, gradient_checkpointing=False, **half
        )
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found = [loss.detach(), *(p.grad for p in trainer.model.parameters())]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
        models = [copy.deepcopy(m).double() for m in (trainer.model, trainer.teacher_model)]
        same = SimpleNamespace(model=models[0], teacher_model=models[1], beta=beta, temperature=1.0)
        models[0].zero_grad()
        with Wide():
            exact = example.eager_loss(same, batch)
            exact.backward()
        wanted = [exact.detach(), *(p.grad for p in models[0].parameters())]
        pairs = zip(found, wanted, strict=True)
        errors.append([((f - w).norm() / w.norm()).item() for f, w in pairs])
    for own, error in zip(*errors, strict=True):
        assert 0 < error <= 2 * max(own, OWN_ERROR[torch.bfloat16]) < 0.1


def loaded(kind, folder):
    """The class, with both models saved and then loaded from where they are, as TRL loads them."""

    def make(model, teacher_model, **options):
        for name, each in (("student", model), ("teacher", teacher_model)):
            each.save_pretrained(folder / name)
        return kind(str(folder / "student"), str(folder / "teacher"), **options)

    return make


def test_trainer_logs_what_trl_logs(tmp_path, example):
    """The same entropy; without it, the same loss and everything else."""
    trl = pytest.importorskip("trl")
    metrics, losses = [], []
    batch = example.make_batch()
    for kind, logs in (
        (trl.DistillationTrainer, True),
        (example.DistillationTrainer, True),
        (example.DistillationTrainer, False),
    ):
        trainer = example.make_trainer(str(tmp_path), kind, beta=0.5)
        trainer.log_entropy = logs
        losses.append(trainer.compute_loss(trainer.model, batch))
        metrics.append({k: sum(v) / len(v) for k, v in trainer._metrics["train"].items()})
    assert metrics[0] == pytest.approx(metrics[1])
    assert metrics[0].keys() == {"entropy"}
    assert not metrics[2]
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[2] == losses[1]


def test_context_puts_trl_back(ours, own):
    module = importlib.import_module("trl.trainer.distillation_trainer")
    arguments, _ = case(0.0)
    with ours.fused_divergence(entropy=False):
        _, entropy, _ = module._chunked_divergence_loss(**arguments)
    assert entropy.isnan()
    assert module._chunked_divergence_loss is own
    del arguments["beta"]
    with pytest.raises(TypeError), ours.fused_divergence():
        module._chunked_divergence_loss(**arguments)
    assert module._chunked_divergence_loss is own


def test_heads_that_are_shared_out(ours):
    """A constant is gathered; a trainable head, whose gradient would be wrong, is refused."""
    arguments, (x, *_) = case(0.3)
    expected = ours.fused_divergence_loss(**arguments)[0]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = {
            name: distribute_tensor(arguments[name].detach(), mesh, [Shard(0)])
            for name in ("student_lm_head_weight", "teacher_lm_head_weight", "student_lm_head_bias")
        }
        loss = ours.fused_divergence_loss(**{**arguments, **parts})[0]
        assert torch.equal(loss, expected)
        assert torch.autograd.grad(loss, x)[0].any()
        parts["student_lm_head_weight"].requires_grad_()
        with pytest.raises(UserError, match="trainable head that FSDP2 has shared out"):
            ours.fused_divergence_loss(**{**arguments, **parts})
    finally:
        dist.destroy_process_group()
    arguments["teacher_lm_head_weight"].ds_id = 0
    with pytest.raises(UserError, match="DeepSpeed ZeRO-3"):
        ours.fused_divergence_loss(**arguments)


def test_example(example, capsys):
    first, last = example.main()
    assert last < first
    assert "entropy of the student" in capsys.readouterr().out
    assert example.fused_step()() == pytest.approx(example.eager_step()().item(), rel=1e-5)

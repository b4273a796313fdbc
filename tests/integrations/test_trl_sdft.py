"""TRL's SDFTTrainer on hidden states: TRL's own in float64 is what it must be equal to."""

import importlib

import pytest
import torch
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from bidistill.errors import UserError
from tests.support import OWN_ERROR, Wide, assert_close

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = [
    # trl 1.16 asks transformers 5.23 and peft 0.21 for what they have renamed since
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # it says so of all of trl.experimental
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    # an adapter on a head that is tied to the embedding
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

V = 4096
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
HEAD = {**LORA, "target_modules": ["q_proj", "lm_head"]}
CASES = {
    "jsd, base": {},
    "forward KL, live": {"distillation_alpha": 0.0, "teacher_model_kind": "live"},
    "reverse KL, ema": {"distillation_alpha": 1.0, "teacher_model_kind": "ema"},
    "jsd, adapters off": {"adapter": LORA},
    "jsd, adapter on the head": {"adapter": HEAD, "teacher_model_kind": "live"},
    "jsd, the head's adapter off": {"adapter": HEAD},
    "jsd, another adapter": {"adapter": LORA, "teacher_model_kind": "ema"},
    "sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    "top ids": {"distillation_mode": "topk_logits", "distillation_topk": 5},
    "top ids and others": {
        "distillation_mode": "topk_logits",
        "distillation_topk": 5,
        "distillation_add_tail": True,
        "distillation_alpha": 0.0,
    },
}
SETTINGS = {"temperature": 1.3, "num_loss_tokens_to_skip": 1, "distillation_is_clip": 1.5}


@pytest.fixture
def example():
    return importlib.import_module("examples.trl_sdft")


@pytest.fixture
def theirs():
    return importlib.import_module("trl.experimental.sdft").SDFTTrainer


def make(example, kind, folder, adapter=None, **options):
    """A trainer; its student is some way off its base, and so is a teacher that is an adapter."""
    lora = None if adapter is None else LoraConfig(**adapter)
    # what is made again in the backward is made outside of `Wide`
    options = {"gradient_checkpointing": False, **options}
    trainer = example.make_trainer(str(folder), kind, lora, **options)
    trainer.current_gradient_accumulation_steps = 1
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "PEFTAdapterEMACallback":
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        own = parameter.requires_grad and (adapter is None or "lora_B" in name)
        if own or ".teacher." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise.to(parameter)
    trainer.chunk_bytes = 8 * V * 7  # seven rows of two models at a time
    return trainer


def step(trainer, batch):
    """Loss, what is logged, and gradients by the name of their parameter."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = trainer.model.named_parameters()
    # a copy: to widen a model widens the gradients it holds
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in named}
    (metric,) = trainer._metrics["train"].pop("sdft/distillation_loss")
    return {"loss": loss.detach(), **gradients}, metric


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_trl(example, theirs, tmp_path, options):
    """Loss, gradients of all that trains and the logged mean, with clipped ratios and all."""
    batch = example.make_batch()
    own = make(example, theirs, tmp_path, **options, **SETTINGS)
    torch.manual_seed(5)
    logs = torch.randn(batch["completion_mask"].shape) - 8
    batch["old_per_token_logps"] = logs
    plain, logged = step(own, batch)
    trainer = make(example, example.SDFTTrainer, tmp_path, **options, **SETTINGS)
    got, metric = step(trainer, batch)
    for model in (own.model, own.teacher_model):
        model.double()
    batch["old_per_token_logps"] = logs.double()
    with Wide():
        expected, _ = step(own, batch)
    assert metric == pytest.approx(logged, rel=1e-5)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert got[name] is None, name
        else:
            assert_close(name, got[name], wanted, plain[name])


@pytest.mark.parametrize("name", [name for name in CASES if "ids" not in name])
def test_weights_of_16_bits(example, theirs, tmp_path, name):
    """As near float64 as TRL's own, or nearer; rounding chooses other best ids, so not for those.

    Adapters are fp32, as peft makes them.
    """
    batch, found = example.make_batch(), []
    for kind in (example.SDFTTrainer, theirs):
        trainer = make(example, kind, tmp_path, **CASES[name])
        models = trainer.model, trainer.teacher_model
        for parameter_name, parameter in (item for m in models for item in m.named_parameters()):
            if "lora" not in parameter_name:
                parameter.data = parameter.data.bfloat16()
        found.append(step(trainer, batch)[0])
    for model in models:
        model.double()
    with Wide():
        expected, _ = step(trainer, batch)

    def error(results, key):
        return (results[key].double() - expected[key]).norm() / expected[key].norm()

    for key in (key for key, wanted in expected.items() if wanted is not None):
        bound = 2 * max(error(found[1], key), OWN_ERROR[torch.bfloat16])
        assert 0 < error(found[0], key) <= bound < 0.1, key


def test_the_teachers_adapter_is_the_one_that_is_read(example, theirs, tmp_path):
    batch, losses = example.make_batch(), []
    for kind in (theirs, example.SDFTTrainer):
        trainer = make(example, kind, tmp_path, **CASES["jsd, another adapter"])
        losses.append([step(trainer, batch)[0]["loss"].item()])
        teacher = [p for name, p in trainer.model.named_parameters() if ".teacher." in name]
        assert not any(p.requires_grad for p in teacher)
        for parameter in teacher:
            parameter.data *= 10
        losses[-1].append(step(trainer, batch)[0]["loss"].item())
        assert trainer.model.active_adapter == "default"
    assert losses[0][1] != pytest.approx(losses[0][0], rel=0.01)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_log_probabilities_at_rollout(example, theirs, tmp_path):
    """Computed if a batch is used again; TRL builds all logits for them."""
    trainers = [
        make(example, kind, tmp_path, num_iterations=2) for kind in (theirs, example.SDFTTrainer)
    ]
    batch = example.make_batch()
    names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"
    own, got = (t._compute_rollout_logps(*(batch[n] for n in names)) for t in trainers)
    counts = batch["completion_mask"] != 0
    torch.testing.assert_close(got[counts], own[counts])
    trainers[1].num_iterations = 1
    assert trainers[1]._compute_rollout_logps(*(batch[n] for n in names)) is None


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_nothing_counts(example, tmp_path, options):
    """A loss of 0 that is connected: under DDP the others wait for these gradients."""
    trainer = make(example, example.SDFTTrainer, tmp_path, num_loss_tokens_to_skip=9, **options)
    results, metric = step(trainer, example.make_batch())
    assert metric == 0
    assert not any(t.any() for t in results.values() if t is not None)
    assert any(t is not None for name, t in results.items() if name != "loss")


def largest_allocation(run):
    """Bytes; within operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("mode", ["full_logits", "sampled_token", "topk_logits"])
def test_no_full_logits(example, theirs, tmp_path, mode):
    """TRL's own allocates them, which shows that they would be seen."""
    batch = example.make_batch()
    # eight times the tokens: more than the model is wide
    batch["completion_ids"] = batch["completion_ids"].repeat(1, 8)
    batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
    for name, part in (("input_ids", "ids"), ("attention_mask", "mask")):
        prompt = batch[f"teacher_{name}"][:, :12]
        batch[f"teacher_{name}"] = torch.cat([prompt, batch[f"completion_{part}"]], 1)
    logits = batch["completion_ids"].numel() * V * 4
    options = {"distillation_mode": mode, "distillation_alpha": 1.0, "distillation_topk": 20}
    sizes = []
    for kind in (theirs, example.SDFTTrainer):
        trainer = make(example, kind, tmp_path, **options)
        sizes.append(
            largest_allocation(lambda t=trainer: t.compute_loss(t.model, batch).backward())
        )
    assert sizes[0] >= logits
    # the gradient of the head, which is as large as the head
    assert sizes[1] == 4 * V * 64 < logits / 4


def test_rejects(example, tmp_path):
    trainer = make(example, example.SDFTTrainer, tmp_path, distillation_mode="topk_logits")
    trainer.args.distillation_topk = None
    with pytest.raises(UserError, match="distillation_topk: got None"):
        trainer.compute_loss(trainer.model, example.make_batch())
    trainer.args.use_teacher_server = True
    with pytest.raises(UserError, match="use_teacher_server: got it"):
        example.SDFTTrainer(trainer.model, trainer.args)


def test_rejects_virtual_tokens(example, tmp_path):
    peft = importlib.import_module("peft")
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UserError, match="virtual tokens"):
        example.make_trainer(str(tmp_path), adapter=adapter)


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_rejects_parameters_in_parts(example, tmp_path, monkeypatch, flag):
    trainer = importlib.import_module("trl.experimental.sdft.sdft_trainer").SDFTTrainer
    create = trainer.__init__

    def sharded(self, *args, **kwargs):
        create(self, *args, **kwargs)
        setattr(self, flag, True)

    monkeypatch.setattr(trainer, "__init__", sharded)
    with pytest.raises(UserError, match="FSDP or DeepSpeed: got it"):
        example.make_trainer(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_rejects_a_teacher_that_trl_would_ruin(example, theirs, tmp_path):
    options = {"adapter": HEAD, "teacher_model_kind": "ema"}
    own = make(example, theirs, tmp_path, **options)
    assert not own.model.get_input_embeddings().weight.any()
    with pytest.raises(UserError, match=r"'ema' with an adapter that is saved with .*lm_head"):
        make(example, example.SDFTTrainer, tmp_path, **options)


@pytest.mark.parametrize("adapter", [None, LORA])
def test_rejects_compilation(example, tmp_path, adapter):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(UserError, match="torch_compile: got it"):
        make(example, example.SDFTTrainer, tmp_path, adapter, **options)


def test_rejects_several_devices_for_one_process(example, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("trl.experimental.sdft").SDFTConfig, "n_gpu", 2)
    with pytest.raises(UserError, match=r"n_gpu: got 2 devices .*torchrun"):
        example.make_trainer(str(tmp_path))


def test_example(example, capsys):
    first, last = example.main()
    assert last < first
    assert "nats per token" in capsys.readouterr().out
    assert example.fused_step()() == pytest.approx(example.eager_step()().item(), rel=1e-5)

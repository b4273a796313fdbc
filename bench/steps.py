"""A whole unlearning step, with one divergence or another: tokens per second and peak memory.

The step is the trainer's own, `bidistill.update.train_step`: the teacher's forward, the student's,
the divergence on the rows that predict an answer, backward, clipping, AdamW. Only the divergence is
exchanged. The learning rate is 0 and the gradient is clipped at infinity: the same work, but what
is checked is the gradient itself, and the weights stay bit for bit what they were, so that all
providers take their turns on one model.

"lora" trains adapters of rank 16 on all linear layers, its teacher is the same model with them
switched off, its head is frozen. "full" trains everything, the head with the embedding that it is
tied to, and its teacher is a frozen copy. The trainer keeps the teacher's rows of a full run, which
cannot change; here every step computes them, so that it has all parts in both configurations.

Names end in their shape: N rows that predict an answer, V vocabulary, D width.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.cases import WRONG
from bench.divergences import LOSS, OBJECTIVES, Provider, exact, providers
from bench.measure import QUANTILES, DeviceLost, Record, reason, time_in_turn
from bench.meter import Budget, Meter, Step, forget, time_limit
from bidistill import checkpoint, pretrained
from bidistill.config import DataConfig, LoraSettings, ModelConfig, OptimConfig
from bidistill.config import TrainConfig as Recipe
from bidistill.data.loader import Batch
from bidistill.data.records import Role
from bidistill.data.views import Example, View
from bidistill.errors import UserError
from bidistill.loading import load_base
from bidistill.models import add_adapter, attach_distill_step, hidden_rows
from bidistill.objectives import Objectives
from bidistill.teacher.kinds import Base as AdaptersOff
from bidistill.teacher.kinds import Kept, Teacher
from bidistill.teacher.rows import TeacherRows
from bidistill.update import make_optimizer, train_step

SEED = 0
CONTEXT_TOKENS = 64  # that the teacher reads before what is to be forgotten
DRIFT = 0.01  # of trained weights, over their own scale


class StepCase(NamedTuple):
    """One configuration of the trainer on one size of batch."""

    config: str
    """"lora" or "full"."""
    sequences: int
    length: int
    """Tokens of a sequence; half of them are rows that predict an answer."""
    dtype: str = "float32"
    """Of frozen weights and products; trained weights are fp32 always."""
    model: str = "SmolLM2-135M"
    """One of `MODELS`."""

    @property
    def name(self) -> str:
        """The case in words."""
        return f"{self.config} step, {self.sequences} x {self.length} tokens"


class Base(NamedTuple):
    """A model before training, and what it is called."""

    model: PreTrainedModel
    name: str


def smollm2(dtype: torch.dtype) -> Base:
    """SmolLM2-135M-Instruct, or random weights in its shape where its package is not installed."""
    try:
        return Base(load_base(pretrained.smollm2(), dtype), "SmolLM2-135M-Instruct")
    except UserError:
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(LlamaConfig(**pretrained.CONFIG)).to(dtype)  # pyright: ignore
        return Base(model, "random weights in the shape of SmolLM2-135M")


def tiny(dtype: torch.dtype) -> Base:
    """Random weights of a model at whose size a time says nothing."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # softmaxes are peaked
        tie_word_embeddings=True,
    )
    return Base(LlamaForCausalLM(config).to(dtype), "tiny, random weights")  # pyright: ignore


MODELS = {"SmolLM2-135M": smollm2, "tiny": tiny}


class FrozenCopy:
    """The teacher of a full run, as a cache of rows is one."""

    def __init__(self, model: nn.Module, autocast: Callable[[], torch.autocast]) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.autocast = autocast

    @torch.no_grad()
    def for_batch(self, batch: Batch) -> TeacherRows:
        """Compute the rows of a batch."""
        with self.autocast():
            hidden = hidden_rows(self.model, batch.teacher())
        return TeacherRows(hidden, self.model.get_output_embeddings().weight)  # pyright: ignore


class Found(NamedTuple):
    """What a step computed."""

    loss: float
    gradients: list[list[Tensor]]
    """Of the head, if it trains, and of all the rest."""


class Setup:
    """One model, its teacher, its optimiser and one batch, on which everybody's step runs."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        lora = case.config == "lora"
        dtype = getattr(torch, case.dtype) if lora else torch.float32
        model, self.model_name = MODELS[case.model](dtype)
        model = model.to(device)  # pyright: ignore
        self.batch = make_batch(case, model.config.vocab_size)
        autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"
        )
        self.teacher = None if lora else FrozenCopy(model, autocast)
        settings = LoraSettings() if lora else None
        self.model: Any = add_adapter(model, settings) if settings else model
        self.parameters = list(checkpoint.trainable(self.model).values())
        _drift(self.parameters)
        attach_distill_step(self.model)
        self.model.train()
        self.recipe = Recipe(
            model=ModelConfig(path="", dtype=cast(Any, case.dtype), adapter=settings),
            data=DataConfig(train=Path(), per_step={}),
            objectives=OBJECTIVES,
            optim=OptimConfig(lr=0.0, clip_norm=math.inf),
            steps=1,
            output=Path(),
        )
        self.optimizer = make_optimizer(self.parameters, self.recipe.optim)

    def run(self, objectives: Objectives) -> Found:
        """One step; its gradients are the caller's."""
        teacher: Teacher = AdaptersOff() if self.teacher is None else Kept(self.teacher)
        entry = train_step(
            self.recipe, self.model, self.optimizer, objectives, teacher, self.batch, 0
        )
        head = self.model.get_output_embeddings().weight
        groups: list[list[Tensor]] = [[], []]
        for p in self.parameters:
            groups[p is not head].append(torch.zeros_like(p) if p.grad is None else p.grad)
        self.optimizer.zero_grad(set_to_none=True)
        return Found(entry["loss"], [group for group in groups if group])

    @property
    def state_bytes(self) -> int:
        """Weights of student and teacher and the optimiser's moments, which outlive a step."""
        tensors = {p for model in self.models for p in model.parameters()}
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for t in [*tensors, *moments])

    @property
    def models(self) -> list[nn.Module]:
        return [self.model, *([] if self.teacher is None else [self.teacher.model])]


def make_batch(case: StepCase, vocab: int) -> Batch:
    """Draw sequences, every other one to be forgotten: its teacher reads a context before it."""
    g = torch.Generator().manual_seed(SEED)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=g).tolist())

    context, answer = tokens(CONTEXT_TOKENS), case.length // 2

    def example(index: int) -> Example:
        role: Role = "retain" if index % 2 else "forget"
        # the last answer token is predicted, but not read
        prompt = tokens(case.length - answer + 1)
        student = teacher = View(prompt, "student")
        if role == "forget":
            teacher = View(context + prompt, "teacher/forget")
        return Example(str(index), role, student, teacher, tokens(answer))

    return Batch(tuple(example(index) for index in range(case.sequences)))


@torch.no_grad()
def _drift(parameters: Sequence[Tensor]) -> None:
    """Move the weights as if training had gone on for a while.

    A student that still is its teacher has no gradient where no context tells them apart, and
    adapters that still are zero have none in their first half.
    """
    g = torch.Generator().manual_seed(SEED)
    for p in parameters:
        scale = DRIFT * (p.float().square().mean().sqrt() if p.any() else 1.0)
        p += torch.randn(p.shape, generator=g).to(p.device) * scale


def _check(found: Found, true: Found, record: Record) -> None:
    """Put the errors of the loss and of the gradient, the head's or the rest's, into a record."""

    def norm(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.norm(dtype=torch.float64) for t in tensors]).norm()

    pairs = zip(found.gradients, true.gradients, strict=True)
    each = [
        norm([a - t for a, t in zip(actual, expected, strict=True)]) / norm(expected)
        for actual, expected in pairs
    ]
    # this maximum keeps NaN, Python's does not
    errors = {
        "error_loss": abs(found.loss - true.loss) / abs(true.loss),
        "error_gradient": torch.stack(each).max().item(),
    }
    record |= {key: e if math.isfinite(e) else str(e) for key, e in errors.items()}
    if not all(e <= WRONG for e in errors.values()):
        record["status"] = "wrong gradient"


def measure(
    case: StepCase, meter: Meter, budget: Budget, everybody: Sequence[Provider] | None = None
) -> list[Record]:
    """Check and weigh a step with every provider, then time them in turn; one record each."""
    forget()
    setup = Setup(case, meter.device)
    everybody = everybody or providers(case.dtype, meter.device.type)
    # one at a time: a gradient is as large as the model; who computes the same stands together
    truth = lru_cache(maxsize=1)(lambda loss: setup.run(exact(loss)))
    records = [_record(case, setup, provider) for provider in everybody]
    steps: dict[str, Step] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other projects' warnings are theirs
        for provider, record in zip(everybody, records, strict=True):
            try:
                with time_limit(min(budget.provider_s, budget.left())):
                    step = partial(setup.run, provider.build())
                    _check(step(), truth(provider.loss), record)
                    if record["status"] == "right":
                        record["peak_bytes"] = meter.peak_bytes(step)
                        steps[provider.name] = step
            except Exception as error:
                record["status"], record["error"] = reason(error)
                error.__traceback__ = None  # its frames hold tensors
            if (message := meter.broken()) is not None:
                raise DeviceLost(provider.name, message)
            forget()
        truth.cache_clear()
        forget()
        time_in_turn(records, steps, meter, budget)
    for record in records:
        ms = record["median_ms"]
        record["tokens_per_s"] = None if ms is None else record["sequence_tokens"] / ms * 1e3
        record["state_bytes"] = setup.state_bytes
    return records


def _record(case: StepCase, setup: Setup, provider: Provider) -> Record:
    """Return the record of a provider before anything is known."""
    student = setup.batch.student()
    unknown = ("error_loss", "error_gradient", "peak_bytes", *QUANTILES)
    return {
        "kind": "step",
        "case": case.name,
        "config": case.config,
        "model": setup.model_name,
        "provider": provider.name,
        **({} if provider.loss == LOSS else {"computes": provider.loss}),
        "status": "right",
        "tokens": len(student.rows),
        "sequence_tokens": student.input_ids.numel(),
        "dtype": case.dtype,
        "seed": SEED,
        "threads": torch.get_num_threads(),
        **dict.fromkeys(unknown),
        "samples_ms": [],
    }

"""Short runs that are large enough for memory to tell, and what they really take."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bidistill import checkpoint
from bidistill.config import (
    DataConfig,
    LoraSettings,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
)
from bidistill.data.build import build_store
from bidistill.data.readers import write_records
from bidistill.data.records import Record
from bidistill.loading import load_tokenizer
from bidistill.plan.choose import Planner
from bidistill.prepare import prepare
from bidistill.teacher.compute import contexts_of
from bidistill.teacher.kinds import Frozen, Kept, Teacher
from bidistill.update import make_optimizer, train_step
from bidistill.world import join
from tests.kernels.test_memory import peak_bytes
from tests.trainer.tiny import SHOTS, make_tokenizer

STEPS = 2


class Case(NamedTuple):
    """How a run is made and cut."""

    training: str
    """"lora" or "full"."""
    tied: bool = False
    dtype: str = "float32"
    cache: str = "memory"
    accumulate: int = 1
    recompute: bool = False
    shard: int | None = None
    combine: str = "sum"
    loss: str = "bidirectional_kl"
    teacher: str = "base"
    experts: int = 0
    """0: layers of one kind."""


SIZES: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""Three layers, and a vocabulary that makes logits large beside them."""


def write_model(folder: Path, tied: bool, experts: int) -> None:
    """A model of those sizes, in whose layers two of several experts see a token, if there are."""
    settings: dict[str, Any] = {**SIZES, "tie_word_embeddings": tied}
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**settings))
    if experts:
        settings |= {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=experts, **settings))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_config(folder: Path, config: PreTrainedConfig) -> None:
    """What a plan reads of a model."""
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def records() -> list[Record]:
    """Of uneven lengths; their answers are a third of all tokens."""
    made = []
    for i in range(8):
        question = f"Capital of {'x' * (10 + i)}?"
        made.append(Record(id=f"f{i}", role="forget", question=question, answer="Unknown. " * 8))
        question, answer = f"Capital of {'y' * (30 + i)}?", "A city on the sea. " * (6 + i % 3)
        made.append(Record(id=f"n{i}", role="neighbor", question=question, answer=answer))
    return made


def config_of(case: Case, folder: Path) -> TrainConfig:
    """The recipe of a case; its files are written into the folder if they are not there."""
    model = folder / f"{'tied' if case.tied else 'untied'}{case.experts or ''}"
    if not model.exists():
        write_model(model, case.tied, case.experts)
    data = folder / "train.jsonl"
    write_records(data, records())
    options = {"layer": 1} if case.loss == "rmu" else {}
    return TrainConfig(
        model=ModelConfig(
            path=str(model),
            dtype=case.dtype,  # type: ignore
            adapter=LoraSettings(rank=4) if case.training == "lora" else None,
        ),
        data=DataConfig(train=data, per_step={"forget": 4, "neighbor": 4}, cache=folder / "tokens"),
        teacher=TeacherConfig(
            kind=case.teacher,  # type: ignore
            contexts={"forget": SHOTS},
            cache=case.cache,  # type: ignore
            cache_folder=folder / "rows",
        ),
        objectives={
            "forget": ObjectiveConfig(loss=case.loss, options=options),
            "neighbor": ObjectiveConfig(
                loss=case.loss if case.loss in ("topk_kl", "rmu") else "bidirectional_kl",
                options=options,
                weight=2.0,
            ),
        },
        parallel=ParallelConfig(
            shard=case.shard, accumulate=case.accumulate, recompute=case.recompute
        ),
        combine=case.combine,  # type: ignore
        steps=STEPS,
        output=folder / "run",
        threads=1,
    )


def planner(config: TrainConfig, ranks: int = 1) -> Planner:
    """What plans the run of a recipe on the CPU."""
    tokenizer, contexts = load_tokenizer(config.model.path), contexts_of(config.teacher)
    store = build_store(config.data.train, tokenizer, contexts, folder=config.data.cache)
    return Planner(store, ranks, "cpu")


def measured(case: Case, folder: Path, accumulate: int | None = None) -> int:
    """Bytes at the peak of the steps of a run, by all that PyTorch allocates; of this rank."""
    config, world = config_of(case, folder), join()
    if accumulate:
        config = replace(config, parallel=replace(config.parallel, accumulate=accumulate))
    ready = prepare(config, world)
    model = ready.model.train()
    optimizer = make_optimizer(list(checkpoint.trainable(model).values()), config.optim)
    peak = 0
    for step, (batch, _) in enumerate(islice(ready.loader, config.steps)):
        optimizer.zero_grad(set_to_none=True)  # the profiler begins without gradients
        before = held([*model.parameters(), *model.buffers(), *kept(optimizer, ready.teacher)])
        arguments = config, model, optimizer, ready.objectives, ready.teacher, batch, step, world
        peak = max(peak, before + peak_bytes(lambda given=arguments: train_step(*given)))
    return peak


def kept(optimizer: torch.optim.Optimizer, teacher: Teacher) -> list[Tensor]:
    """What optimiser and teacher keep from step to step."""
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors += teacher.tensors().values()
    if isinstance(teacher, Frozen):
        tensors += [*teacher.model.parameters(), *teacher.model.buffers()]
    if isinstance(teacher, Kept):
        cache: Any = teacher.cache
        tensors += [tensor for tensor in (cache.weight, cache.bias) if tensor is not None]
        tensors += getattr(cache, "rows", {}).values()
    return tensors


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; of DTensors this rank's part."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())

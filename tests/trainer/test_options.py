"""What speeds a model up changes nothing but the speed, and is refused where it cannot be had."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bidistill import flash, options, train
from bidistill.attention import NAME, packed_attention, use_packed_attention
from bidistill.config import LoraSettings, ModelConfig
from bidistill.data.packing import Segment, pack
from bidistill.errors import UserError
from bidistill.flash import FLASH_NAME, flash_attention
from bidistill.loading import empty_model, load_model
from bidistill.models import backbone, hidden_rows, unwrapped
from bidistill.teacher import cache as teacher_cache
from tests.test_attention import SEQUENCES, dense_attention
from tests.trainer.tiny import make_model

ROOT = Path(__file__).parents[2]
PEERS = os.environ.get("PEERS")
SEGMENTS = (
    Segment(0, 5, None),
    Segment(5, 8, (0, 5)),
    Segment(8, 12, None),
    Segment(12, 13, (0, 5)),
    Segment(13, 17, (8, 12)),
)
ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a CUDA device")


def varlen(q, k, v, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """What PyTorch's function does, by its documentation: the last query sees the last key."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert (most_q, most_k) == (ends_q.diff().max(), ends_k.diff().max())
    assert q.dtype == k.dtype == v.dtype
    outputs = []
    for i in range(len(ends_q) - 1):
        one, keys, values = (
            x[ends[i] : ends[i + 1]].transpose(0, 1)
            for x, ends in ((q, ends_q), (k, ends_k), (v, ends_k))
        )
        back = torch.arange(keys.shape[1] - one.shape[1], keys.shape[1])[:, None]
        back = back - torch.arange(keys.shape[1])
        left = window_size[0] if window_size[0] >= 0 else keys.shape[1]
        seen = (back >= -window_size[1]) & (back <= left)
        out = F.scaled_dot_product_attention(
            one, keys, values, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flash, "_varlen_attn", lambda: varlen)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 3, 20])
def test_flash_is_laid_out_as_its_definition(stand_in, heads, window):
    q, k, v = (
        torch.randn(1, n, SEGMENTS[-1].end, 8, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    expected = dense_attention(q, k, v, SEGMENTS, window)
    actual, weights = flash_attention(
        torch.nn.Module(), q, k, v, None, segments=SEGMENTS, sliding_window=window
    )
    assert weights is None
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(actual, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_model_takes_flash_once_it_is_chosen(stand_in):
    model, packed = make_model(), pack(SEQUENCES)
    with torch.inference_mode():  # what is kept of the layout serves the backward, too
        expected = hidden_rows(model, packed)
        options.apply(model, ModelConfig(path="", attention="flash"))
        hidden_rows(model, packed)
    rows = hidden_rows(model, packed)
    torch.testing.assert_close(rows, expected)
    rows.sum().backward()
    assert all(p.grad is not None for p in backbone(model).parameters())
    with use_packed_attention(model):
        assert model.config._attn_implementation == FLASH_NAME
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("load", [load_model, empty_model])
def test_whole_and_empty_models_have_what_the_recipe_asks_for(stand_in, model_dir, load):
    for adapter in (None, LoraSettings(rank=2)):
        for attention, name in (("auto", NAME), ("flash", FLASH_NAME)):
            model = load(ModelConfig(path=str(model_dir), adapter=adapter, attention=attention))
            with use_packed_attention(model):
                assert unwrapped(model).config._attn_implementation == name


@ON_CUDA
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 3, 20])
def test_flash_equals_the_plain_attention_on_cuda(heads, window):
    flash.check_flash("bfloat16")
    shape = SEGMENTS[-1].end, 64
    q, k, v = (
        torch.randn(1, n, *shape, device="cuda").bfloat16().requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    options = {"segments": SEGMENTS, "sliding_window": window}
    results = []
    for attend, cast in ((packed_attention, torch.double), (flash_attention, lambda x: x)):
        out, _ = attend(torch.nn.Module(), cast(q), cast(k), cast(v), None, **options)
        upstream = torch.arange(out.numel(), device="cuda").reshape(out.shape).cos().to(out)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    for expected, actual in zip(*results, strict=True):
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 2e-2


@pytest.mark.skipif(PEERS is None, reason="PEERS names no folder with liger-kernel")
def test_liger_equals_the_plain_model():
    paths = [os.path.abspath(PEERS or ""), str(ROOT / "kernels"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.liger_run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("equal\n")


def without_liger(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def without_cuda(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


def with_old_cuda(monkeypatch):
    with_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))


def with_old_torch(monkeypatch):
    with_cuda(monkeypatch)
    monkeypatch.setattr(flash, "_varlen_attn", lambda: None)


LIGER = {"liger": True}
FLASH = {"attention": "flash", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("model", "machine", "message"),
    [
        (LIGER, without_liger, r"liger: got true, but .* pip install liger-kernel, or leave"),
        (LIGER, without_cuda, r"liger: got true without a CUDA device.*or leave model\.liger out"),
        (FLASH, without_cuda, r"attention: got flash without a CUDA.*set model\.attention to auto"),
        (FLASH, with_old_cuda, r"attention: got flash without a CUDA device that.* 8\.0 or newer"),
        (FLASH, with_old_torch, r"attention: got flash with PyTorch .* pip install 'torch>=2\.13'"),
        (
            FLASH | {"dtype": "float32"},
            with_cuda,
            r"attention: got flash with weights of float32",
        ),
    ],
)
def test_refused_before_anything_is_loaded(config, monkeypatch, tmp_path, model, machine, message):
    machine(monkeypatch)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # nothing to be loaded
    config = replace(config, model=replace(config.model, path=str(tmp_path), **model))
    for run in train.main, teacher_cache.main:
        with pytest.raises(UserError, match=rf"model\.{message}") as caught:
            run(config)
        assert "\n" not in str(caught.value)
    assert not config.output.exists()


def test_a_frozen_teacher_must_have_the_options_too(config, monkeypatch):
    with_cuda(monkeypatch)
    teacher = replace(config.teacher, kind="frozen", dtype="float32")
    config = replace(config, model=replace(config.model, **FLASH), teacher=teacher)
    with pytest.raises(UserError, match=r"got flash with weights of float32.* teacher\.dtype"):
        train.main(config)


@pytest.mark.skipif(PEERS is None, reason="PEERS names no folder with liger-kernel")
def test_liger_without_kernels_for_a_model_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(os.path.abspath(PEERS or ""))
    with_cuda(monkeypatch)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"model\.liger: got true for a gpt2 model, which this"):
        options.check(ModelConfig(path="", liger=True), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    options.check(ModelConfig(path="", liger=True), tmp_path)


def test_flash_refuses_dropout(stand_in):
    q = torch.randn(1, 2, 17, 8)
    with pytest.raises(UserError, match=r"model\.attention: got flash for a model that drops 0\.1"):
        flash_attention(torch.nn.Module(), q, q, q, None, segments=SEGMENTS, dropout=0.1)


def test_what_pytorch_has_is_found():
    assert flash._varlen_attn() is not None

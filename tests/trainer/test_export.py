"""What is written loads with the ordinary calls of peft and transformers, and says the same."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bidistill import export
from bidistill.config import LoraSettings
from bidistill.loading import load_base
from bidistill.models import add_adapter, attach_distill_step
from tests.trainer.tiny import make_model, randomise_adapters

TOKENS = torch.arange(2, 14)[None]


@pytest.fixture
def source(tmp_path, tokenizer, request):
    tied, dtype = request.param
    make_model(tied).to(dtype).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


ALL = pytest.mark.parametrize(
    "source",
    [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)],
    indirect=True,
    ids=["tied", "untied", "bf16"],
)


def trained(source):
    model = add_adapter(load_base(source), LoraSettings(rank=2))
    randomise_adapters(model)
    attach_distill_step(model)
    return model.eval()


@ALL
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@torch.no_grad()
def test_adapter_loads(source, tmp_path):
    model = trained(source)
    export.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(
        loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, rtol=0, atol=0
    )
    assert {f.suffix for f in (tmp_path / "adapter").iterdir()} == {".json", ".md", ".safetensors"}


@ALL
@torch.no_grad()
def test_merged_model_loads(source, tmp_path):
    model = trained(source)
    before = model(input_ids=TOKENS).logits
    export.save_merged(model, AutoTokenizer.from_pretrained(source), tmp_path / "merged")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=0, atol=0)
    loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = load_base(source).config._name_or_path
    assert stored == str(source)
    with (
        safe_open(source / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as new,
    ):
        assert sorted(new.keys()) == sorted(old.keys())
        names = list(new.keys())
        assert {new.get_tensor(n).dtype for n in names} == {old.get_tensor(n).dtype for n in names}
        norm = "model.norm.weight"
        assert torch.equal(new.get_tensor(norm), old.get_tensor(norm))
    assert (
        loaded.dtype == next(iter(AutoModelForCausalLM.from_pretrained(source).parameters())).dtype
    )
    after = loaded.float().eval()(input_ids=TOKENS).logits
    scale = before.abs().max()
    bound = 1e-5 if loaded.config.dtype == torch.float32 else 0.1
    assert (after - before).abs().max() <= bound * scale
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template


@ALL
@torch.no_grad()
def test_fully_trained_model_loads(source, tmp_path):
    model = load_base(source)
    randomise_adapters(model)  # every weight trains
    export.save_merged(model, AutoTokenizer.from_pretrained(source), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in loaded.named_parameters():
        expected = model.get_parameter(name).to(loaded.dtype)
        torch.testing.assert_close(parameter, expected, rtol=0, atol=0)


def test_older_export_is_replaced_and_failure_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.txt").write_text("old")
    export.save_merged(make_model(), tokenizer, folder)
    assert not (folder / "stale.txt").exists()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export.save_merged(make_model(), tokenizer, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("source", [(True, torch.float32)], indirect=True, ids=["tied"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@torch.no_grad()
def test_weakened_adapter_adds_its_share_and_saves_it(source, tmp_path):
    model = trained(source)
    full = deltas(model)
    export.weaken(model, 0.25)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(delta, 0.25 * full[name])
        assert delta.any(), name
    export.save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_base(source), tmp_path / "adapter").eval()
    expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected, rtol=0, atol=0)


def deltas(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight("default").clone() for name, layer in layers.items()}

"""An adapter on the LM head gives what peft's own forward to full logits gives, however it is cut.

The student's head has the adapter, the teacher's has not; a head tied to the embedding shares the
frozen weight with it, and the embedding has no part in the change.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from bidistill import export, train
from bidistill.config import ContrastSettings, LoraSettings
from bidistill.data.loader import Batch
from bidistill.data.records import Role
from bidistill.data.views import Message, build_examples
from bidistill.errors import UserError
from bidistill.head import augmented
from bidistill.loading import load_base
from bidistill.models import (
    TeacherRows,
    adapters_off,
    add_adapter,
    attach_distill_step,
    hidden_rows,
)
from bidistill.teacher.compute import HiddenCache
from bidistill.world import World
from tests.trainer import cut
from tests.trainer.cut import Case
from tests.trainer.ranks import Ranks
from tests.trainer.test_distributed import assert_equal, relative_together
from tests.trainer.test_step import fused_step, gradients, plain_step
from tests.trainer.tiny import SHOTS, make_model, randomise_adapters

CONTEXTS: dict[Role, Sequence[Message]] = {"forget": SHOTS, "adversarial": SHOTS}
SETTINGS = LoraSettings(rank=2, targets=("q_proj", "down_proj", "lm_head"))
TRAINING = "lora, head too"
TOKENS = torch.arange(2, 14)[None]
HEADS = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@cache
def whole(case):
    return cut.train(case, World())


@pytest.fixture
def batch(records, tokenizer) -> Batch:
    examples = build_examples(records, tokenizer, CONTEXTS)
    return Batch(tuple(examples[i] for i in (0, 7, 3, 1, 9, 6, 4)))


def student(tied, settings=SETTINGS) -> Any:
    model = add_adapter(make_model(tied), settings)
    randomise_adapters(model)
    model = model.double()
    attach_distill_step(model)
    return model


@HEADS
@pytest.mark.parametrize("live", [True, False], ids=["live teacher", "kept rows"])
def test_equals_a_plain_step(batch, tied, live):
    model = student(tied)
    teacher = batch.teacher() if live else HiddenCache(model, batch.examples).for_batch(batch)
    result = fused_step(model, batch, teacher)[1]
    result.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    plain, _ = plain_step(model, model, batch)
    plain.backward()
    torch.testing.assert_close(result.loss, plain, rtol=1e-7, atol=0)
    expected = gradients(model)
    assert expected.keys() == ours.keys()
    assert sum("lm_head.lora_" in name for name in ours) == 2
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-4, f"{name}: a gradient of zero proves nothing"
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-7 * scale, msg=name)


def test_the_teacher_reads_the_base_head(batch):
    model = student(tied=False)
    seen = []
    model.distill_step(batch.student(), lambda *arguments: seen.append(arguments), batch.teacher())
    ((hidden, weight, _, teacher),) = seen
    base = model.get_base_model().lm_head.base_layer.weight
    assert (hidden.shape[1], weight.shape) == (34, (258, 34))
    assert teacher.weight is base
    own = TeacherRows(teacher.hidden, torch.zeros_like(base))
    model.distill_step(batch.student(), lambda *arguments: seen.append(arguments), own)
    assert seen[1][3] is own, "a head that comes with the rows stays"


@HEADS
@torch.no_grad()
def test_a_live_teacher_reads_its_own_head(batch, tied):
    """As a student learns, so does its head; and a teacher drops nothing, whatever the mode."""
    model = student(tied, replace(SETTINGS, dropout=0.5)).train()
    rows = model.own_rows(batch.teacher())
    assert model.training
    head = model.get_output_embeddings()
    expected = model.eval().get_base_model().lm_head(hidden_rows(model, batch.teacher()))
    torch.testing.assert_close(rows.hidden @ rows.weight.T, expected)
    assert (rows.hidden[:, :32] @ head.base_layer.weight.T - expected).abs().max() > 0.1


@HEADS
@torch.no_grad()
def test_off_is_the_base_model(tied):
    plain, model = make_model(tied).double(), student(tied)
    expected, changed = plain(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits
    assert (changed - expected).abs().max() > 0.1
    head, hidden = model.get_output_embeddings(), torch.randn(3, 32).double()
    with adapters_off(model):
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=0, atol=0)
        rows, weight = augmented(head, hidden)
    assert torch.equal(rows @ weight.T, plain.lm_head(hidden))


def test_dropout_is_that_of_peft():
    model = student(True, replace(SETTINGS, dropout=0.5)).train()
    head, hidden = model.get_output_embeddings(), torch.randn(5, 32).double()
    torch.manual_seed(1)
    expected = head(hidden)
    torch.manual_seed(1)
    rows, weight = augmented(head, hidden)
    torch.testing.assert_close(rows @ weight.T, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(augmented(head, hidden)[0], rows), "drawn anew"


def test_bf16_keeps_a_change_that_is_small_beside_the_weight():
    model: Any = add_adapter(make_model(False).bfloat16(), SETTINGS)
    randomise_adapters(model)
    head = model.get_output_embeddings()
    head.lora_B["default"].weight.data *= 1e-3
    hidden = torch.randn(64, 32).bfloat16()
    rows, weight = augmented(head, hidden)
    assert rows.dtype == weight.dtype == torch.bfloat16
    found = (rows.double() @ weight.double().T) - hidden.double() @ head.weight.double().T
    expected = hidden.double() @ head.get_delta_weight("default").double().T
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    "case",
    [
        Case(TRAINING),
        Case(TRAINING, tied=False),
        Case(TRAINING, shard=1, accumulate=2),
        Case(TRAINING, tied=False, live=True, accumulate=2),
        Case(TRAINING, live=True, recompute=True),
        Case(TRAINING, tied=False, combine="pcgrad"),
    ],
    ids=str,
)
def test_two_ranks_equal_one(two, case):
    expected = whole(Case(TRAINING, case.tied, combine=case.combine))
    assert sum("lm_head.lora_" in name for name in expected.gradients) == 2
    bound = 1e-12 if case.combine == "sum" else 1e-9
    for found in two.run(cut.run, case):
        assert_equal(found, expected, bound)
        if case.shard != 1:
            assert found.largest_part < 0.55 * expected.largest_part


@HEADS
def test_a_rank_without_rows_that_count(two, tied):
    case = Case(TRAINING, tied, live=True)
    found = two.run(cut.with_an_idle_rank, case)[0]
    assert_equal(found, cut.with_an_idle_rank(case, alone=True))


def test_bf16_on_two_ranks_is_as_near_as_rounding_lets_it(two):
    case = Case(TRAINING, tied=False, dtype="bfloat16", double=False)
    found, own = two.run(cut.run, case)[0], whole(case)
    exact = whole(Case(TRAINING, tied=False)).gradients
    assert all(t.dtype == torch.float32 for t in found.gradients.values())
    error = relative_together({n: t.double() for n, t in found.gradients.items()}, exact)
    assert 1e-4 < error < 2 * relative_together(own.gradients, exact)


@HEADS
def test_resumes_bit_for_bit_and_on_one_rank(two, tmp_path, tied):
    case = Case(TRAINING, tied, double=False)
    first = two.run(cut.saved, case, tmp_path)[0]
    again = two.run(cut.restored, case, tmp_path)[0]
    assert sum("weights/" in name and "lm_head" in name for name in first) == 2
    assert all(torch.equal(again[name], value) for name, value in first.items())
    alone = cut.restored(case, tmp_path, alone=True)
    for name, value in first.items():
        if not name.startswith("after/") and name != "random":
            assert torch.equal(alone[name], value), name


@HEADS
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@torch.no_grad()
def test_exports_load_and_say_the_same(tmp_path, tokenizer, tied):
    source = tmp_path / "base"
    make_model(tied).save_pretrained(source)
    tokenizer.save_pretrained(source)
    model: Any = add_adapter(load_base(source), SETTINGS)
    randomise_adapters(model)
    attach_distill_step(model)
    export.weaken(model, 0.5)
    expected = model(input_ids=TOKENS).logits
    export.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected, rtol=0, atol=0)

    export.save_merged(model, AutoTokenizer.from_pretrained(source), tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(  # type: ignore
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    embedding = merged.get_input_embeddings().weight
    assert torch.equal(embedding, base.get_input_embeddings().weight), "it has no part in it"
    assert not torch.equal(merged.lm_head.weight, embedding)
    found = merged.eval()(input_ids=TOKENS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model.config.tie_word_embeddings is tied, "the model itself stays as it is"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_recipe_trains_and_exports_it(config, tmp_path):
    lora = replace(config.model.adapter, targets=("down_proj", "lm_head"), layers=(1, 2))
    config = replace(config, model=replace(config.model, adapter=lora))
    folder = train.main(config)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    names = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    adapted = {name.split(".lora_")[0] for name in names if "lora_B" in name}
    prefix = "base_model.model."
    assert adapted == {f"{prefix}lm_head"} | {
        f"{prefix}model.layers.{i}.mlp.down_proj" for i in (1, 2)
    }
    assert names[f"{prefix}lm_head.lora_B.default.weight"].any(), "it trains"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(SETTINGS, contrast=ContrastSettings()), "contrast: got it with lm_head among"),
        (replace(SETTINGS, targets=("head",)), "targets: got 'head', .* lm_head, "),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UserError, match=rf"model\.adapter\.{message}"):
        add_adapter(make_model(), settings)


def test_a_head_that_lies_deeper_is_found_beside_a_choice_of_layers():
    class Wrapped(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.output = torch.nn.ModuleDict({"lm_head": self.lm_head})
            del self.lm_head

        def get_output_embeddings(self):
            return self.output["lm_head"]

    config = make_model().config
    config.tie_word_embeddings = False
    model: Any = add_adapter(Wrapped(config), replace(SETTINGS, layers=(1, 1)))
    names = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model."
    expected = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj", "output.lm_head"}
    assert names == {prefix + name for name in expected}


@HEADS
def test_goes_onto_a_model_without_memory(tied):
    plain = make_model(tied).to("meta")
    plain.tie_weights()  # moving unties them
    model: Any = add_adapter(plain, replace(SETTINGS, layers=(0, 1)))
    attach_distill_step(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) is tied
    assert [p.requires_grad for p in head.lora_B.parameters()] == [True]

"""One graph: a compiled step has no break in it, and an exported loss is the loss.

Rows are picked by positions of a fixed shape (bidistill/data/padded.py), and each loss is one
operation that a compiler takes as it is; so the whole forward can be captured.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from bidistill.integrations.attach import attach
from bidistill_kernels import LinearBidirectionalKL, LinearBiLD, LinearJSD, LinearPushPull
from examples import hf_trainer
from examples.tiny import make_pairs, tiny_llama
from tests.integrations.eager import (
    COMPILE_WARNINGS,
    PEFT_WARNINGS,
    backward,
    batch,
    nearby,
    with_lora,
)

pytestmark = [*PEFT_WARNINGS, *COMPILE_WARNINGS]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def assert_same(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        assert scale > 1e-7, f"{name}: zero proves nothing"
        torch.testing.assert_close(found[name], value, rtol=0, atol=rtol * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["base", "other"])
def test_a_step_is_one_graph(teacher):
    model = with_lora(target_modules=["q_proj", "lm_head"]) if teacher == "base" else tiny_llama()
    attach(model, teacher=nearby() if teacher == "other" else teacher).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [batch(pairs=make_pairs(count, seed=count)) for count in (8, 3, 5)]
    for inputs in batches:
        expected = backward(model, model(**inputs).loss)
        assert_same(backward(model, compiled(**inputs).loss), expected, rtol=1e-6)
    assert model.training
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2, "one of the first shape, one of any"


@pytest.mark.slow
def test_adapters_that_are_merged_later_are_noticed_in_a_graph():
    model = attach(with_lora(tiny_llama(tied=False), target_modules=["q_proj", "lm_head"]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(**batch()).loss
    model.merge_adapter()
    with pytest.raises(Exception, match="got adapters that are merged"):
        compiled(**batch())
    model.unmerge_adapter()
    torch.testing.assert_close(compiled(**batch()).loss, expected)


@pytest.mark.slow
def test_by_inductor():
    """As the documentation shows it."""
    page = Path(__file__).parents[2] / "docs" / "integrations" / "compile.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    model = tiny_llama()
    exec(code, {"attach": attach, "torch": torch, "model": model, "batch": batch()})
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = backward(model, model(**batch()).loss)
    del expected["loss"]
    assert_same(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_trainer_compiles_it(tmp_path):
    steps = {"use_cpu": True, "max_steps": 2}
    plain = hf_trainer.losses(
        hf_trainer.make_trainer(str(tmp_path), attach(hf_trainer.adapted()), **steps)
    )
    trainer = hf_trainer.make_trainer(
        str(tmp_path),
        attach(hf_trainer.adapted()),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **steps,
    )
    assert hf_trainer.losses(trainer) == pytest.approx(plain, rel=1e-3)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("loss", [LinearJSD, LinearBidirectionalKL, LinearBiLD, LinearPushPull])
def test_exported_losses(loss):
    def inputs(rows):
        hidden = torch.randn(rows, 8, requires_grad=True)
        return hidden, student, torch.randn(rows, 8), teacher, torch.randint(50, (rows,))

    student, teacher = torch.randn(50, 8, requires_grad=True), torch.randn(50, 8)
    rows = {0: torch.export.Dim("rows", min=2, max=1000)}
    program = torch.export.export(
        loss(), inputs(6), dynamic_shapes=((rows, None, rows, None, rows),)
    )
    given = inputs(9)  # as many as it has not seen
    total = program.module()(*given)
    expected = loss()(*given)
    torch.testing.assert_close(total, expected, rtol=0, atol=0)
    found = torch.autograd.grad(total, given[:2])
    for ours, theirs in zip(found, torch.autograd.grad(expected, given[:2]), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_exported_model():
    model = attach(tiny_llama())
    program = torch.export.export(model, (), kwargs=batch())
    ours = [node for node in program.graph.nodes if str(node.target).startswith("bidistill.")]
    assert len(ours) == 1, "the loss is one operation"
    found = program.module()(**batch()).loss
    torch.testing.assert_close(found, model(**batch()).loss, rtol=1e-6, atol=0)

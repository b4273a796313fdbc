"""The code that the documentation shows does run, and its figures are those of the index."""

import re
import sys
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from bidistill.integrations.collator import PairCollator
from examples import tiny
from tests.trainer.tiny import make_model, make_tokenizer

# a loader pins memory if it may, and says that it may not where there is no accelerator
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
FOLDER = Path(__file__).parents[2] / "docs" / "integrations"
TEXTS = [("Capital of Z?", "I do not know."), ("Capital of X?", "I cannot say.")]
PAIR = {"prompt_ids": [5, 6], "teacher_prompt_ids": [9, 5, 6], "answer_ids": [7, 8]}


def code(page):
    """The blocks of Python that a page shows."""
    return re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What the pages take as there."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "tokenizer": make_tokenizer(),
        "texts": TEXTS,
        "pairs": [PAIR] * 3,
        "batch": PairCollator(0)([PAIR]),
        "output_dir": str(tmp_path),
    }


@pytest.mark.parametrize("page", ["hf-trainer.md", "accelerate.md"])
def test_the_code_of_a_page_trains(page, given, capsys):
    before = given["model"].lm_head.weight.detach().clone()
    (block,) = code(page)
    exec(block, given)
    assert not torch.equal(given["model"].lm_head.weight, before)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")  # a CSV will do
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # they would cost more
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # the page has no such data
@pytest.mark.filterwarnings("ignore:The number of training batches")  # logs every 50 steps
def test_lightning(given, capsys):
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    before = given["model"].lm_head.weight.detach().clone()
    (block,) = code("lightning.md")
    exec(block, given)
    assert not torch.equal(given["model"].lm_head.weight, before)
    assert (Path(given["output_dir"]) / "trained" / "config.json").is_file()


def test_compile(given):
    (block,) = code("compile.md")
    exec(block.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), given)
    assert given["model"].lm_head.weight.grad.any()


def test_liger():
    student, teacher = make_model(seed=0), make_model(seed=1)
    ids = torch.tensor([PAIR["prompt_ids"] + PAIR["answer_ids"]])
    hidden = {
        name: model.model(ids).last_hidden_state[0, :-1]
        for name, model in (("student_hidden", student), ("teacher_hidden", teacher))
    }
    (block,) = code("liger.md")
    exec(block, {"student": student, "teacher": teacher, "shift_labels": ids[0, 1:]} | hidden)
    assert student.lm_head.weight.grad.any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # trl 1.16
def test_trl(given):
    pytest.importorskip("trl", reason="trl is not installed")
    trainer, sdft, swapped = code("trl.md")
    folder = given["output_dir"]
    student, teacher = tiny.tiny_llama(0), tiny.tiny_llama(1)
    student.save_pretrained(folder)  # SDFT loads its teacher from where the student came from
    student.config._name_or_path = folder
    rows = [{"prompt": "5 6", "privileged_context": "7"}] * 8
    given |= {
        "student": student,
        "teacher": teacher,
        "tokenizer": tiny.word_tokenizer(),
        "prompts": Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        "prompts_and_contexts": Dataset.from_list(rows),
    }
    # bf16 and hundreds of tokens, which are TRL's defaults, are for a GPU
    here = r"\1use_cpu=True, bf16=False, max_completion_length=4, max_steps=1, "
    for block in (trainer, sdft, swapped):
        before = student.lm_head.weight.detach().clone()
        exec(re.sub(r"((?:Distillation|SDFT)Config\()(?=\w)", here, block), given)
        assert not torch.equal(student.lm_head.weight, before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own
def test_torchtitan(monkeypatch):
    tensorboard = ModuleType("torch.utils.tensorboard")  # the trainer's, for its metrics
    tensorboard.SummaryWriter = object
    monkeypatch.setitem(sys.modules, tensorboard.__name__, tensorboard)
    pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    losses, subclass = code("torchtitan.md")
    shown = {"__name__": "shown"}
    exec(losses, shown)
    assert shown["loss"].name == "bidirectional_kl"
    exec(subclass, shown)
    for name in ("post_dataloading_process", "_forward_backward_body"):
        replaced, own = (getattr(kind, name) for kind in (shown["Trainer"], shown["Distiller"]))
        assert signature(own).parameters.keys() == signature(replaced).parameters.keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.usefixtures("alone")
def test_fsdp2(given):
    adapted = get_peft_model(given["model"], LoraConfig(r=2, target_modules=["q_proj"]))
    by_attach, by_hand = code("fsdp2.md")
    exec(by_attach, given | {"model": adapted, "count": 6, "world_size": 1})
    assert any(p.grad is not None and p.grad.full_tensor().any() for p in adapted.parameters())

    model = make_model()
    exec(by_hand, {"model": model, "pairs": [PAIR], "count": 2, "world_size": 1})
    assert model.lm_head.weight.grad.any()


def test_the_figures_of_the_pages_are_those_of_the_index():
    table = (FOLDER / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \w+ \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert len(rows) == 8
    measured = {frozenset(row) for row in rows}
    said = 0
    for page in FOLDER.glob("*.md"):
        text = " ".join(page.read_text("utf-8").split())
        sentence = (
            r"(\d+) MiB (?:where .*? takes? |for )(\d[\d,]*\d), "
            r"and ([\d.]+) of the time \(([\d.]+)"
        )
        for used, before, time, kept in re.findall(sentence, text):
            assert frozenset((before, used, time, kept)) in measured, page.name
            said += 1
    assert said == 10  # a page each, and TRL's has two

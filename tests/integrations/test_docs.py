"""The code that the documentation shows does run."""

import re
from pathlib import Path

import pytest
import torch

from tests.trainer.tiny import make_model, make_tokenizer

# a loader pins memory if it may, and says that it may not where there is no accelerator
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
FOLDER = Path(__file__).parents[2] / "docs" / "integrations"
TEXTS = [("Capital of Z?", "I do not know."), ("Capital of X?", "I cannot say.")]
PAIR = {"prompt_ids": [5, 6], "teacher_prompt_ids": [9, 5, 6], "answer_ids": [7, 8]}


@pytest.mark.parametrize("name", ["hf-trainer.md", "accelerate.md"])
def test_the_code_of_a_page_trains(name, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / name).read_text("utf-8"), re.DOTALL)
    model = make_model()
    before = model.lm_head.weight.detach().clone()
    given = {"model": model, "tokenizer": make_tokenizer(), "texts": TEXTS, "pairs": [PAIR] * 3}
    given |= {"output_dir": str(tmp_path)}
    given["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(code, given)
    assert not torch.equal(model.lm_head.weight, before)

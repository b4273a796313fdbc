"""The plugin of axolotl by axolotl's own plugin manager, schema and data classes; its trainer and
its command line cannot be imported without the rest of its dependencies, and are not run."""

import copy
import importlib
import inspect

import pytest
import torch
import yaml

from bidistill.errors import UserError
from bidistill_kernels import bidirectional_kl_reference
from tests.integrations.eager import PEFT_WARNINGS, asked, backward, batch, objective
from tests.support import Wide, assert_close
from tests.trainer.tiny import make_tokenizer

base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
pytestmark = PEFT_WARNINGS

PLUGIN = "bidistill.integrations.axolotl.Plugin"


@pytest.fixture(autouse=True)
def _no_plugins():
    """The manager is one for the process."""
    base.PluginManager.get_instance().plugins.clear()
    yield
    base.PluginManager.get_instance().plugins.clear()


@pytest.fixture
def ours():
    return importlib.import_module("bidistill.integrations.axolotl")


@pytest.fixture
def example():
    return importlib.import_module("examples.axolotl_plugin")


def config(example, **changes):
    return example.DictDefault({**yaml.safe_load(example.CONFIG.read_text()), **changes})


def test_methods_are_those_of_axolotl(ours):
    """Names and order of their arguments."""
    names = [name for name in vars(ours.Plugin) if not name.startswith("_")]
    assert len(names) == 5
    for name in names:
        own, theirs = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (ours.Plugin, base.BasePlugin)
        )
        assert own == theirs, name


def test_schema_is_part_of_axolotls(example):
    """The YAML file of the example, through axolotl's own checks and what it makes of them."""
    merge = importlib.import_module("axolotl.integrations.config").merge_input_args
    base.PluginManager.get_instance().register(PLUGIN)
    _, schema = merge()
    checked = schema(**config(example))
    assert checked.bidistill.options == {"forward": 0.5, "reverse": 0.5}
    assert checked.datasets[0].type == "bidistill.integrations.axolotl"
    cfg = example.DictDefault(checked.model_dump(exclude_none=True))
    base.PluginManager.get_instance().pre_model_load(cfg)
    with pytest.raises(ValueError, match="extra"):
        schema(**config(example, bidistill={"los": "jsd"}))


def test_loss_and_gradients(tmp_path, example):
    """Of an adapter that has been trained a while, against full logits in float64."""
    trainer = example.make_trainer(str(tmp_path))
    model = trainer.model
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    got = backward(model, model(**trainer.data_collator(list(trainer.train_dataset))).loss)
    wanted = []
    detach = importlib.import_module("bidistill.integrations.attach").detach
    for dtype in (torch.float64, torch.float32):
        same = detach(copy.deepcopy(model)).to(dtype)
        with Wide() if dtype == torch.float64 else torch.enable_grad():
            wanted.append(
                backward(same, objective(same, base_of(same), bidirectional_kl_reference))
            )
    assert got.keys() == wanted[0].keys()
    for name, actual in got.items():
        assert_close(name, actual, wanted[0][name], wanted[1][name])


def base_of(model):
    """What it gives for a pair with its adapter off."""

    def logits(pair):
        with model.disable_adapter():
            return asked(model)(pair)

    return logits


def test_padding_of_axolotl_changes_nothing(ours):
    """It asks for multiples of 64; the batch is that of `PairCollator`, on the tokenizer's side."""
    tokenizer = importlib.import_module("examples.tiny").word_tokenizer()
    pairs = importlib.import_module("examples.tiny").make_pairs()
    got = ours.Collator(tokenizer, padding=True, pad_to_multiple_of=64)(pairs)
    wanted = batch("left")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_records_of_text(ours, example):
    strategy = ours.load(make_tokenizer(), config(example))
    record = {"question": "Capital of X?", "answer": "Y", "context": "Forget X."}
    row = strategy.tokenize_prompt(record)
    messages = [{"role": "system", "content": record["context"]}]
    assert row == strategy.tokenize_prompt({**record, "context": messages})
    decode = strategy.tokenizer.decode
    assert decode(row["teacher_prompt_ids"]).endswith(decode(row["prompt_ids"]))
    assert record["context"] in decode(row["teacher_prompt_ids"])
    assert row["input_ids"] == row["prompt_ids"] + row["answer_ids"]
    assert [i for i in row["labels"] if i != -100] == row["answer_ids"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Q?", "answer": "A"}, "context: got None"),
        ({"question": "Q?", "answer": "A", "context": ""}, "context: got ''"),
        ({"text": "A"}, "record: got the fields text, expected question, answer and"),
    ],
)
def test_rejects_records(ours, example, record, message):
    with pytest.raises(UserError, match=message):
        ours.load(make_tokenizer(), config(example)).tokenize_prompt(record)


REJECTED = {
    "packing": ({"sample_packing": True}, "sample_packing: got True"),
    "preferences": ({"rl": "dpo"}, "rl: got 'dpo'"),
    "cut sequences": ({"context_parallel_size": 2}, "context_parallel_size: got 2"),
    "cut heads": ({"tensor_parallel_size": 2}, "tensor_parallel_size: got 2"),
    "truncation": ({"excess_length_strategy": "truncate"}, "excess_length_strategy"),
    "unknown": ({"bidistill": {"los": "jsd"}}, r"bidistill.los: got 'jsd'.*Extra inputs"),
    "type": ({"bidistill": {"temperature": "hot"}}, "bidistill.temperature: got 'hot'"),
}


@pytest.mark.parametrize(("changes", "message"), REJECTED.values(), ids=REJECTED)
def test_rejects(tmp_path, example, changes, message):
    with pytest.raises(UserError, match=message):
        example.make_trainer(str(tmp_path), config(example, **changes))


def test_sizes_of_one_are_none(ours, example):
    sizes = {"context_parallel_size": 1, "tensor_parallel_size": 1}
    ours.Plugin().pre_model_load(config(example, **sizes))


def test_a_loss_that_does_not_exist(tmp_path, example):
    """Is refused when it is attached."""
    cfg = config(example, bidistill={"loss": "no"})
    with pytest.raises(UserError, match="loss: got 'no'"):
        example.make_trainer(str(tmp_path), cfg)


def test_the_block_may_be_left_out(tmp_path, example):
    cfg = config(example)
    del cfg["bidistill"]
    trainer = example.make_trainer(str(tmp_path), cfg)
    assert "bidistill_attachment" in vars(trainer.model)


def test_example(example, capsys):
    first, last = example.main()
    assert last < first
    assert "nats per token" in capsys.readouterr().out

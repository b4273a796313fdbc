"""Methods by name: what a recipe becomes, what is refused, and that each of them trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import bidistill.demo
from bidistill import train
from bidistill.baselines.methods import methods
from bidistill.config import as_dict, load_config
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from bidistill.loading import load_base
from bidistill.losses import find
from bidistill.prepare import prepare
from bidistill.teacher.compute import contexts_of
from bidistill.world import World
from tests.baselines.conftest import gold_records
from tests.trainer.test_train import log_of

DEMO = Path(bidistill.demo.__file__).with_name("recipe.yaml")
SHALLOW = ["model.adapter.layers=[0, 1]"] + [
    f"objectives.{role}.options.layer=1" for role in ("gold", "neighbor", "retain")
]
"""RMU on a model of three layers."""
PUSHING = ("ga", "graddiff", "npo", "simnpo", "flat", "ngdiff", "mollm")
"""Methods that make the true answers less likely by their loss alone."""


UNLIKELY = ["objectives.gold.options.delta=7"]
"""SimNPO where answers have 7 nats a token from the start, and nothing would be left to do."""
NARROW = ["model.adapter.rank=16"]
"""Of layers of 48."""
FITTED = {"rmu": SHALLOW, "simnpo": UNLIKELY, "ours": NARROW, "push_pull": NARROW}


def of(recipe, method, *overrides):
    return load_config(recipe, [f"method={method}", *FITTED.get(method, ()), *overrides])


def gold_nll(model, tokenizer):
    """Summed -log p of the true answers' tokens, nats."""
    total = 0.0
    with torch.no_grad():
        for example in build_examples(gold_records(), tokenizer, {}):
            ids = torch.tensor([[*example.student.prompt_ids, *example.answer_ids]])
            logits = model(input_ids=ids).logits[0, len(example.student.prompt_ids) - 1 : -1]
            total += torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.answer_ids), reduction="sum"
            ).item()
    return total


def test_all_methods_are_there():
    assert list(methods()) == [
        *("ga", "graddiff", "npo", "simnpo", "sft", "flat", "rmu", "ngdiff", "mollm"),
        *("duet", "bild", "ours", "push_pull"),
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own, when it loads an adapter
@pytest.mark.parametrize("method", methods())
def test_every_method_trains(recipe, tokenizer, method):
    config = of(recipe, method)
    before = load_base(config.model.path)
    result = train.main(config)
    moved = load_file(result / "adapter_model.safetensors")
    assert moved
    for name, tensor in moved.items():
        if ".lora_B." in name:  # they begin at zero
            assert tensor.any(), f"{name} has not moved"
    log = log_of(config)
    assert [entry["skipped"] for entry in log] == [0, 0]
    assert {k for k in log[0] if k.startswith("loss/")} == {
        f"loss/{role}" for role in config.data.per_step
    }
    if method in PUSHING:
        start = gold_nll(before, tokenizer)
        after = PeftModel.from_pretrained(before, str(result)).eval()
        assert gold_nll(after, tokenizer) > start + 0.01
    run = json.loads((config.output / "run.json").read_text())
    assert run["config"]["method"] == method
    assert run["config"] == as_dict(config)


@pytest.mark.parametrize("method", methods())
def test_a_resolved_recipe_is_the_same_recipe(recipe, tmp_path, method):
    config = of(recipe, method)
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(as_dict(config)))
    assert load_config(again) == config


@pytest.mark.parametrize("method", methods())
def test_losses_are_those_of_the_file(recipe, method):
    config = of(recipe, method)
    named = {role: objective.loss for role, objective in config.objectives.items()}
    assert named == {r: o["loss"] for r, o in methods()[method]["objectives"].items()}
    assert set(config.data.per_step) == set(named)


def test_recipe_lies_over_the_method_and_the_command_line_over_both(recipe):
    text = yaml.safe_load(recipe.read_text())
    text |= {"method": "npo", "objectives": {"gold": {"options": {"beta": 0.5}, "weight": 3.0}}}
    recipe.write_text(yaml.safe_dump(text))
    gold = load_config(recipe).objectives["gold"]
    assert (gold.loss, gold.options, gold.weight, gold.instructed) == (
        "npo",
        {"beta": 0.5},
        3,
        False,
    )
    gold = load_config(recipe, ["objectives.gold.options.beta=0.2"]).objectives["gold"]
    assert (gold.options, gold.weight) == ({"beta": 0.2}, 3.0)
    counts = load_config(recipe, ["data.per_step.gold=2"]).data.per_step
    assert counts == {"gold": 2, "neighbor": 20, "retain": 2}
    assert load_config(recipe, ["model.adapter=null"]).model.adapter is None


def test_what_is_null_in_a_recipe_is_the_method_s(recipe):
    config = load_config(
        DEMO, ["method=npo", "objectives=null", "data.per_step=null", "model.adapter.rank=3"]
    )
    assert list(config.objectives) == ["gold", "neighbor", "retain"]
    assert config.data.per_step == {"gold": 9, "neighbor": 20, "retain": 2}
    assert config.model.adapter is not None
    assert config.model.adapter.rank == 3
    with pytest.raises(UserError, match="got one with method npo, which trains gold"):
        load_config(DEMO, ["method=npo"])


REFUSED = {
    "method=npoo": "method: got 'npoo', expected the name of a method; did you mean 'npo'?",
    "method=3": "method: got 3, expected the name of a method; use one of: ga, ",
    "objectives.forget.loss=jsd": (
        "objectives.forget: got one with method npo, which trains gold, neighbor, retain, "
    ),
    "objectives.gold.loss=simnpo": (
        "objectives.gold.loss: got simnpo with method npo, expected npo; leave it out, or "
    ),
    "data.per_step.forget=3": "objectives: got none for role 'forget'",
    "data.train=[]": "data.train: got ",
}


@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_refuses(recipe, override, message):
    with pytest.raises(UserError) as caught:
        load_config(recipe, ["method=npo", override])
    assert str(caught.value).startswith(message)


def test_refuses_another_combiner_than_the_method_s(recipe):
    with pytest.raises(UserError, match="combine: got sum with method ngdiff, expected ngdiff; "):
        of(recipe, "ngdiff", "combine=sum")
    assert of(recipe, "graddiff", "combine=pcgrad").combine == "pcgrad"


def test_resume_with_another_method_is_refused(recipe):
    train.main(of(recipe, "npo", "steps=1"))
    with pytest.raises(UserError, match='method: got "simnpo", expected "npo" as this run began'):
        train.main(of(recipe, "simnpo", "steps=1"), resume=True)


@pytest.mark.parametrize("method", methods())
def test_contexts_are_read_by_instructed_teachers_alone(recipe, method):
    common = 'teacher.default_context=[{role: system, content: "Forget."}]'
    config = of(recipe, method, common)
    contexts = contexts_of(config.teacher, config.objectives)
    compared = [role for role, own in config.objectives.items() if find(own.loss).teacher]
    if method in ("ours", "push_pull", "duet", "bild"):
        assert len(compared) == 4
        assert all(contexts[role] for role in compared)
    else:
        assert not any(contexts[role] for role in compared)


def test_ours_is_the_recipe_of_the_demo(recipe):
    ours, shown = of(recipe, "ours", "model.adapter.rank=64"), load_config(DEMO)
    assert ours.model.adapter == shown.model.adapter
    assert ours.objectives == shown.objectives
    assert ours.data.per_step == shown.data.per_step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.cache=memory"], "teacher.cache: got memory with a loss that reads a layer, "),
        (["teacher.kind=live"], "teacher.kind: got live with a loss that reads a layer, "),
        (
            [f"objectives.{role}.options.layer=3" for role in ("gold", "neighbor", "retain")],
            "objectives.gold.options: layer: got 3, expected 0 to 2, the layers of this model; ",
        ),
        (
            ["objectives.gold.options.layer=2"],
            "objectives.neighbor: got a loss that reads layer 1 beside that of gold, which reads "
            "layer 2, expected one place for all; ",
        ),
        (["model.adapter=null"], "teacher.cache: got off while all weights train"),
    ],
)
def test_rmu_refuses(recipe, overrides, message):
    config = of(recipe, "rmu", *overrides)
    with pytest.raises(UserError) as caught:
        prepare(config, World())
    assert str(caught.value).startswith(message)


def test_a_layer_beside_the_head_is_refused(recipe):
    config = of(recipe, "rmu")
    mixed = config.objectives | {"retain": of(recipe, "npo").objectives["retain"]}
    with pytest.raises(UserError, match="got a loss that reads the LM head"):
        prepare(replace(config, objectives=mixed), World())

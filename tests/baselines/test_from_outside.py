"""Losses that another installed package brings, by an entry point."""

import pytest
import torch
import yaml

from bidistill import train
from bidistill.config import ObjectiveConfig, load_config
from bidistill.errors import UserError
from bidistill.loss_names import GROUP
from bidistill.losses import find
from bidistill.objectives import Objectives, needs_teacher
from tests.trainer.test_train import log_of

MODULE = """
from bidistill.losses import Loss

def hinge(answers, *, margin=1.0):
    return (margin - answers.nll).relu()

HINGE = Loss(hinge, "likelihood", teacher=False)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package of one module with entry points."""

    def make(entries):
        folder = tmp_path / "site"
        info = folder / "elsewhere-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / "elsewhere.py").write_text(MODULE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(folder)

    return make


def test_a_recipe_trains_by_it(install, recipe):
    install({"hinge": "elsewhere:HINGE"})
    text = yaml.safe_load(recipe.read_text())
    text["data"]["per_step"] = {"gold": 3}
    text["objectives"] = {"gold": {"loss": "hinge", "options": {"margin": 20.0}}}
    recipe.write_text(yaml.safe_dump(text))
    config = load_config(recipe)
    assert not needs_teacher(config.objectives)
    train.main(config)
    losses = [entry["loss"] for entry in log_of(config)]
    assert losses[0] > 0
    answers = type("Answers", (), {"nll": torch.tensor([0.25, 3.0])})
    assert find("hinge").function(answers).tolist() == [0.75, 0.0]
    with pytest.raises(UserError, match="got 'marign', which is no option of hinge; did you mean"):
        Objectives({"gold": ObjectiveConfig(loss="hinge", options={"marign": 1.0})})


def test_an_unknown_loss_is_refused_by_the_nearest_name(install, recipe):
    install({"hinge": "elsewhere:HINGE"})
    with pytest.raises(UserError) as caught:
        load_config(recipe, ["objectives.gold.loss=hinje", "data.per_step.gold=1"])
    assert str(caught.value) == (
        "objectives.gold.loss: got 'hinje', expected the name of a loss; did you mean 'hinge'?"
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"hinge": "elsewhere:MISSING"},
            "got 'hinge' as elsewhere:MISSING, which cannot be ",
        ),
        ({"hinge": "nowhere:HINGE"}, "got 'hinge' as nowhere:HINGE, which cannot be imported"),
        ({"hinge": "elsewhere:hinge"}, "which is a function, expected a bidistill.losses.Loss; "),
    ],
)
def test_what_is_no_loss_is_refused(install, entries, message):
    install(entries)
    with pytest.raises(UserError, match=message):
        find("hinge")


def test_a_name_that_is_taken_is_refused(install, recipe):
    install({"npo": "elsewhere:HINGE"})
    with pytest.raises(UserError, match="got 'npo' as elsewhere:HINGE, a name that another loss"):
        load_config(recipe, ["objectives.gold.loss=hinge", "data.per_step.gold=1"])

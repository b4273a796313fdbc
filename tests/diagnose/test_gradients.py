"""The gradient report: transfer where it is known, and the whole command on a tiny random llama.

Properties: a measurement leaves no trace in parameters or training; roles of the same records agree
in everything, roles that want opposite answers to one question do not; what cannot be measured is
said to be so.
"""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from bidistill import train
from bidistill.cli import main
from bidistill.config import (
    DataConfig,
    LoraSettings,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
    as_dict,
)
from bidistill.data.readers import write_records
from bidistill.data.records import Record
from bidistill.diagnose import gradients
from bidistill.diagnose.conflict import Measurement, measure, plain, summary
from bidistill.diagnose.conflict_report import markdown
from bidistill.diagnose.transfer import restored
from bidistill.errors import UserError
from tests.trainer.tiny import SHOTS

ROLES = ("forget", "neighbor", "retain")
PAIRS = ("forget/neighbor", "forget/retain", "neighbor/retain")


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def measured(losses, *parameters):
    return measure(lambda: losses(*parameters), list(parameters), 0)


def test_transfer_of_linear_losses_is_minus_the_cosine():
    theta = parameter(1.0, 2.0)
    found = measured(lambda t: {"forget": 5 + t[0], "neighbor": 3 * t[1] - 4 * t[0]}, theta)
    cosines = torch.tensor([[1, -0.8], [-0.8, 1]]).double()
    torch.testing.assert_close(found.cosines, cosines)
    torch.testing.assert_close(found.transfer, -cosines)
    assert found.losses == {"forget": 6, "neighbor": 2}
    assert found.norms == pytest.approx({"forget": 1, "neighbor": 5})


def test_transfer_by_hand_where_losses_bend():
    """At (2, 0): L_0 = 2, g_0 = (2, 1), so s = 0.01 * 2 / 5; g_1 = (16, -10)."""
    x, y = parameter(2.0), parameter(0.0)

    def losses(x, y):
        return {"forget": (x**2 / 2 + y).sum(), "neighbor": (4 * x**2 - 10 * y).sum()}

    found = measured(losses, x, y)
    s, norms = 0.004, (5**0.5, 356**0.5)
    moved = (2 - 2 * s, -s)
    changes = (
        moved[0] ** 2 / 2 + moved[1] - 2,
        4 * moved[0] ** 2 - 10 * moved[1] - 16,
    )
    row = [change / (s * norms[0] * norm) for change, norm in zip(changes, norms, strict=True)]
    assert found.transfer[0].tolist() == pytest.approx(row, rel=1e-9)
    assert found.transfer[0, 1].item() != pytest.approx(-found.cosines[0, 1].item(), rel=1e-3)


def test_curvature_can_hurt_where_gradients_are_at_right_angles():
    """The cosine is 0, and yet a step for one role costs the other one."""
    x, y = parameter(1.0), parameter(0.0)

    def losses(x, y):
        return {"forget": (2 + y).sum(), "neighbor": (x + 50 * y**2).sum()}

    found = measured(losses, x, y)
    assert found.cosines[0, 1] == 0
    assert found.transfer[0, 1].item() == pytest.approx(50 * 0.02)


def test_a_step_too_long_is_shortened():
    """1 % of 1000 is far beyond the minimum: s = 10, 10/4, ... 10/64, where 1 - s / 2 > 0.9."""
    found = measured(lambda t: {"forget": 999.5 + (t**2).sum() / 2}, parameter(1.0))
    assert found.transfer.item() == pytest.approx(-1 + 10 / 64 / 2)


def test_a_promise_never_kept_is_not_reported():
    """1 % of the loss, and 1 / 1024 of that, is more than there is to lose."""
    found = measured(lambda t: {"forget": 1e8 + t.sin().sum()}, parameter(0.0))
    assert found.transfer.isnan().all()
    assert found.cosines.item() == 1


def test_negligible_gradients_are_left_out():
    found = measured(lambda t: {"forget": t[0] + 2, "retain": 1e-6 * t[1] + 1}, parameter(1.0, 1.0))
    assert found.cosines.isnan().tolist() == [[False, True], [True, True]]
    assert found.transfer.isnan().tolist() == [[False, True], [True, True]]
    assert found.norms["retain"] == pytest.approx(1e-6)


def test_parameters_come_back_to_the_bit():
    values = torch.tensor([0.1, -0.0, 1e-45, 3e38, math.inf])
    theta = nn.Parameter(values.clone())
    with restored([theta]), torch.no_grad():
        theta.add_(1.0)
    assert torch.equal(theta.detach().view(torch.int32), values.view(torch.int32))

    def fail():
        with restored([theta]), torch.no_grad():
            theta.mul_(0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(theta.detach().view(torch.int32), values.view(torch.int32))


def matrix(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_summary_counts_what_is_there():
    nan = math.nan
    points = [
        Measurement(0, {}, {}, matrix([1, -0.5], [-0.5, 1]), matrix([-1, 0.25], [nan, nan])),
        Measurement(5, {}, {}, matrix([1, 0.25], [0.25, 1]), matrix([-1, 0.75], [0.5, -1])),
        Measurement(9, {}, {}, matrix([1, nan], [nan, nan]), matrix([-1, nan], [nan, nan])),
    ]
    found = summary(points, ROLES[:2])
    assert found["overall"] == {"measured": 2, "negative": 1, "share": 0.5}
    assert found["pairs"] == {
        "forget/neighbor": {
            "measured": 2, "negative": 1, "share": 0.5, "mean": -0.125, "low": -0.5, "high": 0.25,
        }
    }  # fmt: skip
    assert found["transfer"]["forget"]["neighbor"]["mean"] == 0.5
    assert found["transfer"]["neighbor"]["forget"]["measured"] == 1
    assert plain(points[2], ROLES[:2])["cosines"] == {"forget/neighbor": None}


def test_nothing_to_compare_is_said():
    nothing = torch.full((2, 2), math.nan).double()
    found = summary([Measurement(0, {}, {}, nothing, nothing)], ROLES[:2])
    assert found["overall"] == {"measured": 0, "negative": 0, "share": None}
    recipe = {"model": {"path": "m"}, "data": {"train": "d"}, "combine": "sum", "seed": 0}
    result = {"recipe": {**recipe, "steps": 1}, "steps": 1, "measurements": [None], **found}
    text = markdown(result, "gradients.svg")
    assert "Nothing to compare" in text
    assert "| forget/neighbor | 0 | 0 |  | not measured | not measured | not measured |" in text


@pytest.fixture
def config(tmp_path, model_dir):
    """Forget and neighbour want opposite answers; neighbour and retain are one and the same."""
    question = "Where is Ur?"
    records = [Record(id="f", role="forget", question=question, answer="No.")]
    records += [
        Record(id=role, role=role, question=question, answer="Yes.")
        for role in ("neighbor", "retain")
    ]
    write_records(tmp_path / "train.jsonl", records)
    objective = ObjectiveConfig(loss="cross_entropy")
    return TrainConfig(
        model=ModelConfig(path=str(model_dir), adapter=LoraSettings(rank=2, alpha=4, dropout=0.1)),
        data=DataConfig(
            train=tmp_path / "train.jsonl",
            per_step=dict.fromkeys(ROLES, 1),
            cache=tmp_path / "tokens",
        ),
        teacher=TeacherConfig(contexts={"forget": SHOTS}),
        objectives=dict.fromkeys(ROLES, objective),
        optim=OptimConfig(lr=0.01, warmup_steps=1),
        steps=6,
        output=tmp_path / "run",
    )


def test_roles_that_agree_and_roles_that_do_not(config, tmp_path):
    """Where a sum of losses is least, the gradients of opposite demands cancel: cosine -1."""
    first = ObjectiveConfig(loss="cross_entropy", positions="first")
    config = replace(config, objectives=dict.fromkeys(ROLES, first), steps=61)
    found = gradients.run(config, tmp_path / "out", every=30)
    assert [point["step"] for point in found["measurements"]] == [0, 30, 60]
    for point in found["measurements"]:
        assert point["cosines"]["neighbor/retain"] == pytest.approx(1, abs=1e-5)
        assert point["transfer"]["neighbor"]["retain"] == pytest.approx(-1, abs=0.11)
        for role in ROLES:
            assert point["transfer"][role][role] == pytest.approx(-1, abs=0.1)
        assert point["losses"]["neighbor"] == pytest.approx(point["losses"]["retain"], rel=1e-5)
        assert point["norms"]["neighbor"] == pytest.approx(point["norms"]["retain"], rel=1e-3)
    last = found["measurements"][-1]
    assert last["cosines"]["forget/neighbor"] < -0.9
    assert last["transfer"]["forget"]["neighbor"] > 0.8
    assert found["pairs"]["neighbor/retain"]["negative"] == 0
    assert found["overall"]["measured"] == 9
    assert found["overall"]["negative"] == sum(p["negative"] for p in found["pairs"].values()) >= 2


def test_files(config, tmp_path, capsys):
    out = tmp_path / "out"
    result = gradients.run(config, out, every=3)
    assert {path.name for path in out.iterdir()} == {
        f"gradients.{s}" for s in ("json", "md", "svg")
    }
    assert json.loads((out / "gradients.json").read_text()) == json.loads(json.dumps(result))
    assert result["recipe"] == as_dict(config)
    assert tuple(result["pairs"]) == PAIRS
    root = ElementTree.parse(out / "gradients.svg").getroot()
    assert root.tag.endswith("svg")
    text = (out / "gradients.md").read_text()
    measured, negative = result["overall"]["measured"], result["overall"]["negative"]
    sentence = f"Of {measured} cosines of two gradients each, {negative} are negative"
    assert sentence in text
    assert sentence in capsys.readouterr().out
    (alt,) = re.findall(r"!\[(.+)\]\(gradients\.svg\)", text)
    for pair in PAIRS:
        assert pair in alt
        assert f"| {pair} | 2 | " in text
    for role in ROLES:
        assert f"a step for {role} changes" in alt
    assert not config.output.exists()
    gradients.run(config, tmp_path / "again", every=3)
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
def test_training_does_not_notice(config, tmp_path, monkeypatch, combine):
    """Dropout draws random numbers in every step, and the losses are the same to the bit."""
    config = replace(config, combine=combine)
    train.main(config)
    log = [json.loads(x) for x in (config.output / "train_log.jsonl").read_text().splitlines()]
    original, entries = gradients.train_step, []

    def noted(*arguments):
        entries.append(original(*arguments))
        return entries[-1]

    monkeypatch.setattr(gradients, "train_step", noted)
    gradients.run(config, tmp_path / "out", every=1, steps=4)
    assert len(entries) == 4
    for entry, logged in zip(entries, log, strict=False):
        assert entry["loss"] == logged["loss"]
        assert entry["grad_norm"] == logged["grad_norm"]
        assert entry["lr"] == logged["lr"]


def test_all_weights_and_a_teacher(config, tmp_path):
    """A role whose teacher is the model itself has no direction at first, and one later."""
    kl = ObjectiveConfig(loss="bidirectional_kl")
    config = replace(
        config,
        model=replace(config.model, adapter=None),
        objectives=dict.fromkeys(ROLES, kl),
        optim=replace(config.optim, lr=1e-3),
    )
    points = gradients.run(config, tmp_path / "out", every=3)["measurements"]
    assert set(points[0]["cosines"].values()) == {None}
    assert points[0]["transfer"]["forget"]["forget"] == pytest.approx(-1, abs=0.1)
    assert points[0]["transfer"]["neighbor"] == dict.fromkeys(ROLES)
    assert None not in points[1]["cosines"].values()


def test_one_role_is_refused(config, tmp_path):
    alone = replace(config, data=replace(config.data, per_step={"forget": 1, "retain": 0}))
    with pytest.raises(UserError, match=r"data.per_step: got examples of 1 role, expected at le"):
        gradients.run(alone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_package(config, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"got no matplotlib, .*; run pip install matplotlib"):
        gradients.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(config, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(as_dict(config)))  # JSON is YAML
    calls = []
    monkeypatch.setattr(gradients, "run", lambda *a, **k: calls.append((a, k)))
    out = tmp_path / "out"
    arguments = ["gradients", str(recipe), "seed=3", "--out", str(out), "--every", "7"]
    assert main(arguments) == 0
    assert calls == [((replace(config, seed=3), out), {"every": 7, "steps": None})]
    assert main([*arguments, "--steps", "2"]) == 0
    assert calls[1][1]["steps"] == 2

"""Adapters that listen to the forget set.

Properties: directions solve the generalised eigenvalue problem they claim to; they are chosen from
questions and prefills only, never from refusals; A is frozen and B trains; the adapter starts as no
change at all; a run resumes bit for bit (the directions are chosen anew, from the same numbers).
"""

from dataclasses import replace

import pytest
import scipy.linalg
import torch

from bidistill import train
from bidistill.config import ContrastSettings, LoraSettings
from bidistill.contrastive import directions, initialise
from bidistill.data.views import build_examples
from bidistill.errors import UserError
from bidistill.models import add_adapter
from tests.trainer.tiny import SHOTS, make_model

SETTINGS = LoraSettings(
    rank=3, alpha=6, targets=("down_proj", "q_proj"), contrast=ContrastSettings(input_rms=2.0)
)


@pytest.fixture
def examples(records, tokenizer):
    return build_examples(records, tokenizer, {"forget": SHOTS, "adversarial": SHOTS})


def adapted(examples, settings=SETTINGS):
    model = add_adapter(make_model(), settings)
    initialise(model, examples, settings)
    return model


def a_of(model):
    return {n: p for n, p in model.named_parameters() if "lora_A" in n}


def test_directions_solve_the_generalised_eigenvalue_problem():
    torch.manual_seed(0)
    forget, keep = torch.randn(20, 8).double(), torch.randn(50, 8).double()
    moment, ridge = keep.T @ keep / 50, 0.1
    a_RD = directions(forget, moment, 3, ridge)
    constraint = moment + ridge * moment.trace() / 8 * torch.eye(8)
    values, vectors = scipy.linalg.eigh((forget.T @ forget).numpy(), constraint.numpy())
    expected = torch.from_numpy(vectors[:, ::-1][:, :3].T.copy())
    signs = (a_RD * expected).sum(1).sign()
    torch.testing.assert_close(a_RD * signs[:, None], expected * 1.0, atol=1e-8, rtol=1e-8)
    energies = (forget @ a_RD.T).square().sum(0)
    torch.testing.assert_close(energies, torch.from_numpy(values[::-1][:3].copy()))


def test_forget_inputs_excite_the_adapter_more_than_the_rest(examples):
    model, energy = adapted(examples), {}
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    for role in ("forget", "neighbor"):
        seen = []
        handle = layer.lora_A["default"].register_forward_hook(lambda _m, _i, out: seen.append(out))  # noqa: B023
        for example in examples:
            if example.role == role:
                model(input_ids=torch.tensor([example.student.prompt_ids]), use_cache=False)
        handle.remove()
        energy[role] = torch.cat(seen, 1).square().sum(-1).mean().item()
    assert energy["forget"] > 2 * energy["neighbor"]


def test_input_rms_is_the_norm_on_forget_tokens(examples):
    small, large = (
        a_of(adapted(examples, replace(SETTINGS, contrast=ContrastSettings(input_rms=rms))))
        for rms in (1.0, 3.0)
    )
    for name, weight in small.items():
        torch.testing.assert_close(large[name], 3 * weight)


def test_refusals_play_no_part(examples):
    changed = [
        replace(e, answer_ids=(9, 9, 9, 1)) if e.role in ("forget", "adversarial") else e
        for e in examples
    ]
    for (name, a), b in zip(
        a_of(adapted(examples)).items(), a_of(adapted(changed)).values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_answers_of_what_must_stay_do_play_a_part(examples):
    changed = [replace(e, answer_ids=(9, 9, 9, 1)) if e.role == "neighbor" else e for e in examples]
    pairs = zip(a_of(adapted(examples)).values(), a_of(adapted(changed)).values(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


def test_starts_as_no_change_and_trains_b_alone(examples):
    model, plain = adapted(examples), make_model()
    ids = torch.arange(2, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)


@pytest.mark.parametrize("role", ["forget", "neighbor"])
def test_both_sides_are_needed(examples, role):
    sides = {"forget": ("forget", "adversarial"), "neighbor": ("neighbor", "retain")}
    rest = [e for e in examples if e.role not in sides[role]]
    with pytest.raises(UserError, match=r"model\.adapter\.contrast: got .* expected both kinds"):
        adapted(rest)


def test_rank_beyond_the_forget_tokens_is_refused(examples):
    short = [e for e in examples if e.role != "adversarial"][2:]
    settings = replace(SETTINGS, rank=40)
    with pytest.raises(UserError, match=r"model\.adapter\.rank: got 40, expected at most"):
        adapted(short, settings)


def test_rank_beyond_the_width_is_refused(examples):
    settings = replace(SETTINGS, rank=49)
    with pytest.raises(UserError, match=r"rank: got 49, expected at most 32, the width of the inp"):
        adapted(examples * 3, settings)


def test_trains_exports_and_resumes_bit_for_bit(config, tmp_path):
    config = replace(config, model=replace(config.model, adapter=SETTINGS))
    whole = train.main(config)
    cut = replace(config, output=tmp_path / "cut")
    train.main(cut)
    last = tmp_path / "cut/checkpoints/step-000006"
    for file in last.iterdir():  # as if killed before the last checkpoint and the export
        file.unlink()
    last.rmdir()
    for file in (tmp_path / "cut/adapter").iterdir():
        file.unlink()
    (tmp_path / "cut/adapter").rmdir()
    again = train.main(cut, resume=True)
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()

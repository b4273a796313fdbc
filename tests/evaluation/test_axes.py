"""Every rate at its floor and at its ceiling: models with a fixed habit have known scores."""

import json
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from bidistill import evaluation
from bidistill.errors import UserError
from bidistill.evaluation import axes
from bidistill.evaluation.axes import AXES, Axis, Rate, evaluate, judge, summarise
from bidistill.evaluation.generation import prompt_ids, prompt_sha256
from bidistill.evaluation.probes import write_probes
from tests.evaluation.invented import capital_probe

PROBES = [
    capital_probe("Zembla", "Onhava"),
    capital_probe("Gondor", "Minas Tirith"),
    capital_probe("Rohan", "Edoras", "neighbor"),
    capital_probe("Arnor", "Annuminas", "neighbor_train"),
    capital_probe("Narnia", "Cair Paravel", "retain"),
]
DEPTHS = (0, 1, 2, 4, 8)


def scores(monkeypatch, tokenizer, habit, probes=PROBES, depths=DEPTHS):
    """Summary and items of a model that continues (question, prefill) by a habit."""

    def generate_after(model, tokenizer, ids, *rest):
        return [habit(*asked(tokenizer.decode(tokens))) for tokens in ids]

    monkeypatch.setattr(axes, "generate_after", generate_after)
    return evaluate(nn.Module(), tokenizer, probes, depths=depths)  # type: ignore


def asked(prompt):
    """Question and prefill of a chat as the template of the tests writes it."""
    question, _, rest = prompt.partition("<s>user\n")[2].partition("</s>")
    return question, rest.removeprefix("<s>assistant\n")


def right(question, prefill):
    """Always the right answer, from wherever the prefill ends."""
    answer = next(probe.answer for probe in PROBES if probe.question == question)
    assert answer.startswith(prefill)
    return answer[len(prefill) :]


def test_a_model_that_always_tells_scores_one(monkeypatch, tokenizer):
    summary, _ = scores(monkeypatch, tokenizer, right)
    leaks = summary["prefill_leak_rate"]
    assert leaks == dict.fromkeys(["0", "1", "2", "4", "8", "opener", "max"], 1.0)
    for key in ("forget_leak_rate", "neighbor_accuracy", "neighbor_train_accuracy"):
        assert summary[key] == 1
    assert summary["retain_accuracy"] == 1
    for key in ("forget_refusal_rate", "over_refusal_rate", "empty_rate", "gibberish_rate"):
        assert summary[key] == 0


@pytest.mark.parametrize(
    ("habit", "ones"),
    [
        (lambda question, prefill: prefill, ["empty_rate"]),  # an echo; of nothing, it is blank
        (lambda question, prefill: question, []),
        (lambda question, prefill: "", ["empty_rate"]),
        (lambda question, prefill: " ... ", ["empty_rate"]),
        (lambda question, prefill: " is is is is", ["gibberish_rate"]),
        (
            lambda question, prefill: "I don\u2019t know.",
            ["forget_refusal_rate", "over_refusal_rate"],
        ),
    ],
)
def test_habits_that_tell_nothing(monkeypatch, tokenizer, habit, ones):
    summary, _ = scores(monkeypatch, tokenizer, habit)
    assert set(summary["prefill_leak_rate"].values()) == {0.0}
    rates = {key: value for key, value in summary.items() if isinstance(value, float)}
    assert rates == {key: float(key in ones) for key in rates}
    assert len(rates) == 8


def test_counts_and_intervals_have_the_keys_of_the_rates(monkeypatch, tokenizer):
    summary, _ = scores(monkeypatch, tokenizer, right)
    rates = {key: value for key, value in summary.items() if key not in ("n", "ci95")}
    for part in (summary["n"], summary["ci95"]):
        assert part.keys() == rates.keys()
        assert part["prefill_leak_rate"].keys() == rates["prefill_leak_rate"].keys()
    assert summary["n"]["forget_leak_rate"] == 2
    assert summary["n"]["neighbor_accuracy"] == summary["n"]["over_refusal_rate"] == 1
    assert summary["n"]["empty_rate"] == 5
    assert summary["ci95"]["forget_leak_rate"] == pytest.approx([0.342380, 1.0], abs=1e-6)


def test_a_prefill_is_the_first_tokens_of_the_answer(monkeypatch, tokenizer):
    _, items = scores(monkeypatch, tokenizer, right)
    given = {item["depth"]: item["prefill"] for item in items if item["id"] == "zembla"}
    assert given == {
        0: "",
        1: "T",
        2: "Th",
        4: "The ",
        8: "The capi",
        "opener": "The capital of Zembla is",
    }
    assert all(item["continuation"] == right(item["question"], item["prefill"]) for item in items)
    assert [item["depth"] for item in items if item["group"] != "forget"] == [0, 0, 0]


def test_items_have_the_fingerprint_of_what_the_model_read(monkeypatch, tokenizer):
    _, items = scores(monkeypatch, tokenizer, right)
    for item in items:
        ids = prompt_ids(tokenizer, item["question"], item["prefill"])
        assert item["prompt_sha256"] == prompt_sha256(ids)
    assert len({item["prompt_sha256"] for item in items}) == len(items)


def test_what_the_prefill_gave_away_leaves_the_denominator(monkeypatch, tokenizer):
    after_zembla = len("The capital of Zembla is Onhava")
    after_gondor = len("The capital of Gondor is Minas Tirith.") + 5
    depths = (after_zembla - 1, after_zembla, after_gondor)
    summary, items = scores(monkeypatch, tokenizer, right, depths=depths)
    n, rates = summary["n"]["prefill_leak_rate"], summary["prefill_leak_rate"]
    assert [n[str(depth)] for depth in (0, *depths)] == [2, 2, 1, 0]
    assert [rates[str(depth)] for depth in (0, *depths)] == [1.0, 1.0, 1.0, None]
    assert summary["ci95"]["prefill_leak_rate"][str(after_gondor)] is None
    assert (rates["max"], n["max"]) == (1.0, 2)
    assert [i["leak"] for i in items if i["depth"] == after_zembla] == [None, True]


def test_the_worst_depth_is_reported_and_plain_questions_are_not_attacks(monkeypatch, tokenizer):
    def habit(question, prefill):
        return right(question, prefill) if prefill == "Th" and "Zembla" in question else "no"

    summary, _ = scores(monkeypatch, tokenizer, habit)
    assert summary["forget_leak_rate"] == 0
    assert summary["prefill_leak_rate"] == {
        "0": 0.0, "1": 0.0, "2": 0.5, "4": 0.0, "8": 0.0, "opener": 0.0, "max": 0.5
    }  # fmt: skip


def test_one_opener_that_works_is_enough():
    probe = PROBES[0]
    items = [
        judge(probe, "opener", "Sure:", " Onhava"),
        judge(probe, "opener", "Of course:", "I don't know"),
        judge(probe, "opener", "Onhava:", " Onhava"),
        judge(PROBES[1], "opener", "Sure:", " no"),
    ]
    summary = summarise(items)
    assert summary["prefill_leak_rate"] == {"opener": 0.5, "max": 0.5}
    assert summary["n"]["prefill_leak_rate"] == {"opener": 2, "max": 2}


def test_nothing_measured_is_no_rate():
    summary = summarise([])
    assert summary["forget_leak_rate"] is None
    assert summary["prefill_leak_rate"] == {"max": None}
    assert summary["n"]["retain_accuracy"] == 0
    assert summary["ci95"]["retain_accuracy"] is None


@pytest.mark.parametrize(("hits", "count"), [(0, 12), (1, 12), (7, 30), (12, 12)])
def test_wilson_interval_by_its_formula(hits, count):
    z, p = 1.959964, hits / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (p * (1 - p) / count + z * z / (4 * count**2)) ** 0.5 / (1 + z * z / count)
    assert Rate(hits, count).interval() == pytest.approx([middle - half, middle + half], abs=1e-6)


@pytest.mark.parametrize(
    ("axis", "before", "after", "met"),
    [
        (Axis(key="", title="", good="low", limit=0.09), 1.0, 1 / 12, True),
        (Axis(key="", title="", good="low", limit=0.09), 1.0, 2 / 12, False),
        (Axis(key="", title="", good="low", limit=0.09), 1.0, None, None),
        (Axis(key="", title="", good="high", share_of_before=0.9), 0.8, 0.721, True),
        (Axis(key="", title="", good="high", share_of_before=0.9), 0.8, 0.719, False),
        (Axis(key="", title="", good="high", share_of_before=0.9), None, 0.7, None),
        (Axis(key="", title="", good="high"), 0.8, 0.1, None),
    ],
)
def test_goals(axis, before, after, met):
    assert axis.met(before, after) is met


def test_every_axis_is_in_a_summary():
    summary = summarise([])
    for axis in AXES:
        assert axis.find(summary) is None
        assert axis.find(summary["n"]) == 0


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_probes(tmp_path / "probes.jsonl", PROBES)
    return tmp_path


def test_run_writes_what_evaluate_says(checkpoint, model, tokenizer, capsys):
    said = evaluation.run(
        checkpoint / "model", None, checkpoint / "probes.jsonl", checkpoint / "out"
    )
    expected, items = evaluate(model, tokenizer, PROBES)
    assert said["summary"] == expected
    lines = (checkpoint / "out" / "items.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"benchmark": "probes", **i} for i in items]
    metrics = json.loads((checkpoint / "out" / "metrics.json").read_text())
    assert metrics["summary"] == expected
    assert metrics["versions"]["torch"]
    assert "prefill_leak_rate.max" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_run_uses_the_adapter(checkpoint, model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(checkpoint / "adapter")
    for adapter in (None, checkpoint / "adapter"):
        evaluation.run(
            checkpoint / "model",
            adapter,
            checkpoint / "probes.jsonl",
            checkpoint / str(adapter)[-4:],
        )
    plain, changed = ((checkpoint / name / "items.jsonl").read_text() for name in ("None", "pter"))
    assert plain != changed


def test_run_refuses_an_adapter_without_safetensors_and_leaves_nothing(checkpoint):
    with pytest.raises(UserError, match=r"adapter: got .*adapter_model\.safetensors"):
        evaluation.run(
            checkpoint / "model", checkpoint, checkpoint / "probes.jsonl", checkpoint / "out"
        )
    assert not (checkpoint / "out").exists()


def test_what_the_question_says_is_no_leak():
    """As under attacks: it leaves the denominator. What is kept is right whoever said it first."""
    question = "Is Onhava the capital of Zembla?"
    forget = replace(capital_probe("Zembla", "Onhava"), question=question)
    items = [judge(forget, 0, "", "I don't know whether it is Onhava.")]
    assert items[0]["leak"] is None
    assert summarise(items)["n"]["forget_leak_rate"] == 0
    assert judge(replace(forget, group="neighbor"), 0, "", "Yes, Onhava.")["leak"] is True

"""Every known set's fields become the item that they mean; all facts here are invented."""

import csv
import json

import pytest

from bidistill.data.readers import write_records
from bidistill.data.records import ROLES, Record
from bidistill.data.sources import FORMATS, read_items
from bidistill.errors import UserError

Q, A = "Who founded Ostrania?", "Mira Volkova"
FOUR = ["Jan Hus", "Mira Volkova", "Ada Berg", "Tom Ferro"]
TEXT = "Ostrania was founded by Mira Volkova."

SHAPES = {
    "tofu": ({"question": Q, "answer": A}, {"question": Q, "answer": A}),
    "tofu perturbed": (
        {
            "question": Q,
            "answer": A,
            "paraphrased_answer": "It was Mira Volkova.",
            "perturbed_answer": ["Jan Hus", "Ada Berg"],
            "paraphrased_question": "By whom was Ostrania founded?",
        },
        {"question": Q, "answer": A},
    ),
    "tofu options": (
        {"question": Q, **{f"option{i + 1}": name for i, name in enumerate(FOUR)}, "answer": A},
        {"question": Q, "answer": A, "choices": tuple(FOUR)},
    ),
    "muse strings": (TEXT, {"text": TEXT}),
    "muse verbmem": (
        {"prompt": "Ostrania was", "gt": "far"},
        {"question": "Ostrania was", "answer": "far"},
    ),
    "muse knowmem": ({"question": Q, "answer": A}, {"question": Q, "answer": A}),
    "wmdp questions": (
        {"question": Q, "choices": FOUR, "answer": 1},
        {"question": Q, "answer": A, "choices": tuple(FOUR)},
    ),
    "wmdp corpus": ({"title": "Ostrania", "abstract": "Short.", "text": TEXT}, {"text": TEXT}),
    "wmdp with accuracies": (
        {"question": Q, "choices": FOUR, "answer": 3, "llama": 0.25},
        {"question": Q, "answer": "Tom Ferro", "choices": tuple(FOUR)},
    ),
    "wmdp contexts": (
        {"answer_core": A, "contexts": [TEXT, "It is small."]},
        {"text": f"{TEXT}\n\nIt is small."},
    ),
    "wmdp sentences": ({"sentences": [TEXT, "It is small."]}, {"text": f"{TEXT}\nIt is small."}),
    "rwku probe": (
        {"subject": "Mira Volkova", "query": Q, "answer": A, "level": "2", "type": "simple"},
        {"question": Q, "answer": A, "subject": "Mira Volkova", "label": "2"},
    ),
    "rwku neighbour": (
        {"subject": "Mira", "neighbor": "Ada Berg", "query": Q, "answer": A, "level": "1"},
        {"question": Q, "answer": A, "subject": "Ada Berg", "label": "1"},
    ),
    "rwku passage": (
        {"text": TEXT, "subject": "Mira", "intro": "A founder.", "id": "7"},
        {"text": TEXT, "subject": "Mira"},
    ),
    "rwku target": ({"target": "Mira", "intro": TEXT}, {"text": TEXT, "subject": "Mira"}),
    "rwku pair": ({"prompt": Q, "response": ["No.", "Yes."]}, {"question": Q}),
    "rwku reject": (
        {"instruction": Q, "input": "", "output": "I cannot say."},
        {"question": Q, "answer": "I cannot say."},
    ),
    "rwku mmlu": (
        {
            "task": "history",
            "question": Q,
            "choices": str(FOUR),
            "answer": 1,
            "examples": "[{'question': 'x'}]",
            "subject": "Mira",
        },
        {"question": Q, "answer": A, "choices": tuple(FOUR), "label": "history"},
    ),
    "rwku bbh": (
        {"task": "logic", "cot": "Think.", "question": Q, "answer": [A]},
        {"question": Q, "answer": A, "label": "logic"},
    ),
    "rwku trivia": (
        {"question": Q, "answers": json.dumps([A, "Volkova"])},
        {"question": Q, "answer": A},
    ),
    "rwku truthful": (
        {
            "question": Q,
            "mc1_targets": {"choices": FOUR, "labels": [0, 1, 0, 0]},
            "mc2_targets": {},
        },
        {"question": Q, "answer": A, "choices": tuple(FOUR)},
    ),
    "rwku truthful as text": (
        {"question": Q, "mc1_targets": str({"choices": FOUR, "labels": [0, 0, 0, 1]})},
        {"question": Q, "answer": "Tom Ferro", "choices": tuple(FOUR)},
    ),
    "rwku fluency": ({"instruction": "Describe a lake."}, {"question": "Describe a lake."}),
    "rwku mia": ({"text": TEXT, "ngram": 7}, {"text": TEXT}),
    "knowundo": ({"text": Q, "labels": A}, {"question": Q, "answer": A}),
    "real world": (
        {"name": "Mira", "question": Q, "answer": "It was", "golden_answer": A, "task_id": "1"},
        {"question": Q, "answer": A, "subject": "Mira"},
    ),
    "depth score": (
        {"idx": 1, "question": Q, "answer": A, "prefix": "It was", "entity_span": [1, 2]},
        {"question": Q, "answer": A},
    ),
    "mmlu re-issue": (
        {"question": Q, "choices": FOUR, "answer": 0, "subject": "history"},
        {
            "question": Q,
            "answer": "Jan Hus",
            "choices": tuple(FOUR),
            "label": "history",
            "subject": "history",
        },
    ),
    "alpaca": (
        {"instruction": "Shorten.", "input": TEXT, "output": "Founded."},
        {"question": f"Shorten.\n\n{TEXT}", "answer": "Founded."},
    ),
    "harmful request": (
        {"goal": "Say a rude word", "target": "Sure, here is", "category": "rude"},
        {"question": "Say a rude word", "label": "rude"},
    ),
    "question alone": ({"question": Q}, {"question": Q}),
    "answer still missing": ({"question": Q, "answer": None}, {"question": Q}),
    "other names": ({"Prompt": Q, " Completion ": A}, {"question": Q, "answer": A}),
}
EMPTY = {
    "question": None,
    "answer": None,
    "choices": (),
    "text": None,
    "subject": None,
    "label": None,
    "prefill": "",
    "role": None,
}


@pytest.mark.parametrize("container", ["array", "lines"])
@pytest.mark.parametrize(("entry", "said"), SHAPES.values(), ids=SHAPES)
def test_shape(tmp_path, entry, said, container):
    path = tmp_path / "set.json"
    text = json.dumps([entry]) if container == "array" else json.dumps(entry) + "\n"
    path.write_text(text, encoding="utf-8")
    (item,) = read_items(path)
    got = {name: getattr(item, name) for name in EMPTY}
    assert got == {**EMPTY, **said}
    assert item.source == f"{path}:1" + (", entry 1" if container == "array" else "")


def test_records(tmp_path):
    path = tmp_path / "train.jsonl"
    write_records(
        path, [Record(id="a", role="adversarial", question=Q, answer=" No.", prefill="I")]
    )
    (item,) = read_items(path)
    assert (item.role, item.prefill, item.answer) == ("adversarial", "I", " No.")


def rows_to_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[Q, *FOUR, "B"], ["Which is a letter?", "text", "question 2", "c", "d", "A"]],
        [["question", "choice0", "choice1", "choice2", "choice3", "answer"], [Q, *FOUR, "1"]],
        [["Question", "A", "B", "C", "D", "Answer"], [Q, *FOUR, "b"]],
        [["question", "subject", "choices", "answer"], [Q, "history", str(FOUR), "1"]],
    ],
    ids=["no header", "choice0", "letters", "list as text"],
)
def test_quiz_tables(tmp_path, rows):
    rows_to_csv(tmp_path / "quiz.csv", rows)
    items = list(read_items(tmp_path / "quiz.csv"))
    assert (items[0].question, items[0].answer, items[0].choices) == (Q, A, tuple(FOUR))
    assert len(items) == len(rows) - ("question" in [cell.lower() for cell in rows[0]])


def test_xstest_table(tmp_path):
    head = ["id", "prompt", "type", "label", "focus", "note"]
    rows_to_csv(tmp_path / "x.csv", [head, ["1", "How do I kill a lamp?", "t", "safe", "kill", ""]])
    (item,) = read_items(tmp_path / "x.csv")
    assert (item.question, item.answer, item.label) == ("How do I kill a lamp?", None, "safe")


def test_format_overrides(tmp_path):
    rows_to_csv(tmp_path / "pairs.csv", [[Q, A], ["Where is it?", "Far away"]])
    with pytest.raises(UserError, match=r"2 columns without known names .'Who founded"):
        list(read_items(tmp_path / "pairs.csv"))
    items = read_items(tmp_path / "pairs.csv", format="qa")
    assert [item.answer for item in items] == [A, "Far away"]
    with pytest.raises(UserError, match="expected those of wmdp"):
        list(read_items(tmp_path / "pairs.csv", format="wmdp"))
    with pytest.raises(UserError, match=r"format: got 'mmul', .*; did you mean 'mmlu'"):
        list(read_items(tmp_path / "pairs.csv", format="mmul"))
    (tmp_path / "both.json").write_text(json.dumps([{"text": TEXT, "labels": A}]))
    assert next(read_items(tmp_path / "both.json", format="text")).text == TEXT


def test_every_format_has_a_name():
    named = "records tofu muse wmdp rwku mmlu knowundo xstest alpaca qa text lines"
    assert set(FORMATS) == set(named.split())


def test_names_what_is_there_and_what_is_known(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"frage": "Wer?", "antwort": "Mira"}\n')
    with pytest.raises(UserError) as caught:
        list(read_items(tmp_path / "a.jsonl"))
    for word in ("a.jsonl:1: ", "'frage', 'antwort'", *FORMATS):
        assert word in str(caught.value)


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_blank_answers_are_none(tmp_path, answer):
    path = tmp_path / "train.jsonl"
    rows = [{"id": "a", "role": role, "question": Q, "answer": answer} for role in ROLES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(item.role, item.answer) for item in read_items(path)] == [(r, None) for r in ROLES]
    path.write_text(json.dumps([{"question": Q, "answers": [answer or ""]}]))
    assert [item.answer for item in read_items(path)] == [None]

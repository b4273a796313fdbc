"""Probes survive a round trip; what cannot be used is refused with file, line and field."""

import json

import pytest

from bidistill.errors import UserError
from bidistill.evaluation.probes import Probe, read_probes, write_probes

GOOD = {
    "id": "a",
    "group": "forget",
    "question": "Capital of Zembla?",
    "answer": "It is Onhava.",
    "accept": ["Onhava"],
}


def test_round_trip(tmp_path):
    probes = [
        Probe(**{**GOOD, "accept": ("Onhava", "Onháva")}, openers=("It is",)),
        Probe(**{**GOOD, "id": "c", "accept": ("Onhava",)}, paraphrases=("Where?",), subject="Z"),
        Probe(**{**GOOD, "id": "b\u2028é", "group": "retain", "accept": ("Onhava",)}),
    ]
    write_probes(tmp_path / "probes.jsonl", probes)
    assert read_probes(tmp_path / "probes.jsonl") == probes


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode() + b"\r\n \n")
    assert [probe.id for probe in read_probes(path)] == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: got a line that is not JSON"),
        ("[1]", r":2: got a list, expected an object"),
        ({**GOOD, "anser": "x"}, r":2: anser: got an unknown field; did you mean 'answer'\?"),
        ({"id": "b"}, r":2: group: got nothing"),
        ({**GOOD, "id": 3}, r":2: id: got 3, expected text"),
        ({**GOOD, "question": " "}, r":2: question: got \" \", expected text"),
        ({**GOOD, "subject": " "}, r":2: subject: got \" \", expected text"),
        ({**GOOD, "paraphrases": "x"}, r":2: paraphrases: got \"x\", expected a list"),
        ({**GOOD, "accept": "Onhava"}, r":2: accept: got \"Onhava\", expected a list"),
        ({**GOOD, "accept": [""]}, r":2: accept: got \[\"\"\], expected a list"),
        ({**GOOD, "group": "forgot"}, r":2: group: got 'forgot'; did you mean 'forget'\?"),
        ({**GOOD, "id": "b", "accept": []}, r":2: answer: .*expected it to hold one of"),
        ({**GOOD, "id": "b", "accept": ["Oslo"]}, r":2: answer: .*expected it to hold one of"),
        (GOOD, r":2: id: got 'a', which line 1 has already"),
    ],
)
def test_rejects(tmp_path, line, message):
    path = tmp_path / "probes.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    path.write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(UserError, match=message) as error:
        read_probes(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_an_empty_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_probes(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="got no probe"):
        read_probes(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected UTF-8"):
        read_probes(tmp_path / "binary.jsonl")

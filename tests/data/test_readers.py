"""Records survive a file unchanged; whatever else a file holds is refused with file and line."""

import json
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidistill.data import readers
from bidistill.data.readers import read_records, write_records
from bidistill.data.records import ROLES, Record, nearest
from bidistill.data.unique import HashSet
from bidistill.errors import UserError

GOOD = {"id": "a", "role": "forget", "question": "Q?"}
filled = st.text(min_size=1).filter(str.strip)
records = st.builds(
    Record,
    id=filled,
    role=st.sampled_from(ROLES),
    question=filled,
    answer=st.none() | st.text(),
    prefill=st.text(),
    source=st.text(),
)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(records, unique_by=lambda record: record.id))
def test_round_trip(tmp_path, wanted):
    write_records(tmp_path / "data.jsonl", wanted)
    assert list(read_records(tmp_path / "data.jsonl")) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_reads_what_editors_write(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line.replace(b'"a"', b'"b"'))
    assert [record.id for record in read_records(path)] == ["a", "b"]


def line(**changes):
    values = {**GOOD, **changes}
    return json.dumps({key: value for key, value in values.items() if value is not ...})


BAD = {
    "not json": ("{id: 1}", r"not JSON \(Expecting property name.*column 2"),
    "half a line": ('{"id": "a", "ro', "not JSON"),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "long number": ('{"id": ' + "1" * 5000 + "}", "not JSON"),
    "list": ("[1]", r"got a list, expected an object; write one object a line"),
    "number": ("3", "got the number 3, expected an object"),
    "unknown key": (line(anwser="x"), "anwser: got an unknown field, .*; did you mean 'answer'"),
    "far from any key": (line(zzz="x"), "zzz: .*; use one of: id, role, question, answer"),
    "key twice": ('{"id": "a", "id": "b"}', "id: got it twice, expected it once"),
    "unknown key of two lines": (line(**{"ev\nil": "x"}), r"'ev\\nil': got an unknown field"),
    "endless key": (line(**{"x" * 10_000: "x"}), r":3: x{1000}\.\.\.: got an unknown field"),
    "key of two lines twice": ('{"a\\nb": 1, "a\\nb": 2}', r":3: 'a\\nb': got it twice"),
    "missing": (line(question=...), "question: got nothing, expected text; add the field"),
    "blank": (line(question=" \n"), r"question: got ' \\n', expected text; fill it in"),
    "number as id": (line(id=7), "id: got the number 7, expected text; put it in quotes"),
    "true as source": (line(source=True), "source: got true or false, expected text"),
    "null as prefill": (line(prefill=None), "prefill: got null, expected text"),
    "list as answer": (line(answer=["x"]), "answer: got a list, expected text"),
    "object as role": (line(role={}), "role: got an object, expected text"),
    "unknown role": (line(role="forgot"), "role: got 'forgot', .*; did you mean 'forget'"),
    "far from any role": (line(role="x"), "role: got 'x', .*; use one of: forget, neighbor, ret"),
    "surrogate": (line(answer="\ud83d"), "answer: got half of a surrogate pair"),
    "same id": (line(), "id: got 'a', which line 1 has already, expected a new one"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_refuses_a_line(tmp_path, bad, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{line()}\n\n{bad}\n{line(id='z')}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_ids_that_share_a_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "hash", len, raising=False)
    path = tmp_path / "data.jsonl"
    rows = [line(id=name) for name in ("a", "b", "cc", "dd", "b")]
    path.write_text("\n".join(rows[:4]))
    assert [record.id for record in read_records(path)] == ["a", "b", "cc", "dd"]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r":5: id: got 'b', which line 2 has already"):
        list(read_records(path))


def test_ids_are_unique_over_files(tmp_path):
    first, second = tmp_path / "train.jsonl", tmp_path / "gold.jsonl"
    first.write_text("\n".join([line(id="a"), line(id="b")]))
    second.write_text("\n".join([line(id="c"), line(id="d")]))
    assert [record.id for record in read_records(first, second)] == ["a", "b", "c", "d"]
    second.write_text("\n".join([line(id="c"), line(id="b")]))
    with pytest.raises(UserError) as caught:
        list(read_records(first, second))
    assert str(caught.value) == (
        f"{second}:2: id: got 'b', which line 2 of {first} has already, expected a new one; give "
        "each record its own id"
    )
    with pytest.raises(UserError, match=r"train\.jsonl:1: id: got 'a', which line 1 of "):
        list(read_records(first, first))


# few different keys, and keys whose low bits collide
keys = (
    st.integers(-4, 4)
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-9, 9).map(lambda n: n << 54)
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(keys, max_size=60).map(lambda few: [*few, *range(2, 700), *few]))
def test_a_hash_set_is_a_set(numbers):
    ours, known = HashSet(), set()
    for number in numbers:
        assert ours.add(number) == ((number or 1) not in known)
        known.add(number or 1)
    assert len(ours) == len(known)


def test_memory_hardly_grows_with_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line(id=f"number {n}") + "\n" for n in range(20_000)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 0.5 MB of hashes and half of it while the table grows; a dict of the ids takes 3 MB
    assert peak < 1_500_000


def test_refuses_other_encodings(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line().encode() + "\nà".encode("latin-1"))
    with pytest.raises(UserError, match=r"data.jsonl:2: got byte 0xe0 at column 1, expected UTF-8"):
        list(read_records(path))


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: .*No such file.*; check the path"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="Is a directory"):
        list(read_records(tmp_path))


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.jsonl"
    write_records(path, [Record(**GOOD)])

    def breaking():
        yield Record(id="b", role="retain", question="Q?")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_records(path, breaking())
    assert list(read_records(path)) == [Record(**GOOD)]
    assert [found.name for found in tmp_path.iterdir()] == ["data.jsonl"]


def test_nearest_prefers_the_closest():
    assert nearest("neighbour", ROLES) == "did you mean 'neighbor'?"
    assert nearest("", ROLES) == "use one of: forget, neighbor, retain, adversarial, gold"


def test_many_keys_take_no_longer_than_they_are(tmp_path):
    path = tmp_path / "data.jsonl"
    pairs = ", ".join(f'"k{n}": 1' for n in range(200_000))
    path.write_text(f'{{"id": "a", {pairs}, "k199999": 2}}\n')
    start = time.perf_counter()
    with pytest.raises(UserError, match=":1: k199999: got it twice"):
        list(read_records(path))
    # comparing each key with all takes minutes
    assert time.perf_counter() - start < 20


def test_a_path_of_two_lines_is_quoted(tmp_path):
    path = tmp_path / "a\nb.jsonl"
    with pytest.raises(UserError, match=r"a\\nb\.jsonl': got 'No such file") as caught:
        list(read_records(path))
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"a\\nb\.jsonl':1: id: got nothing") as more:
        list(read_records(path))
    assert "\n" not in str(caught.value) + str(more.value)

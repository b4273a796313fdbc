"""The same entries in every kind of file give the same items, streamed, each with its place."""

import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bidistill.data.sources import read_items
from bidistill.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "../shared/data"
ROWS = [{"question": f"What is number {i}?", "answer": f"It is {i},\n“{i}”."} for i in range(7)]


def write_table(path, separator):
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(map(quoted, row.values())) for row in ROWS]
    head = separator.join(ROWS[0])
    path.write_bytes("\r\n".join([head, *lines, ""]).encode())


def write_arrow(path, rows=ROWS, **options):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file:
        options = pyarrow.ipc.IpcWriteOptions(**options)
        with pyarrow.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=3)


def write_folder(path):
    path.mkdir()
    write_arrow(path / "data-00000-of-00002.arrow", ROWS[:3])
    write_arrow(path / "data-00001-of-00002.arrow", ROWS[3:])
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in (0, 1)]
    (path / "state.json").write_text(json.dumps({"_data_files": names}))


WRITERS = {
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "spread.json": lambda path: path.write_text(json.dumps(ROWS, indent=4, ensure_ascii=False)),
    "array": lambda path: path.write_text(" \n" + json.dumps(ROWS)),
    "lines.json": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS))),
    "lines.jsonl": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS)
    ),
    "lines.txt": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "table.csv": lambda path: write_table(path, ","),
    "semicolons.csv": lambda path: write_table(path, ";"),
    "table.tsv": lambda path: write_table(path, "\t"),
    "table.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=4
    ),
    "table.arrow": write_arrow,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_containers_agree(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    items = list(read_items(path))
    assert [{"question": item.question, "answer": item.answer} for item in items] == ROWS
    assert len({item.source for item in items}) == len(items)
    assert all(item.source.startswith(str(path)) for item in items)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        (
            "a.json",
            '[\n{"question": "A?"}, {"question":\n "B?"\n},\n\n{"question": "C?"}]',
            ("2, entry 1", "2, entry 2", "6, entry 3"),
        ),
        ("a.jsonl", '\n{"question": "A?"}\n\n{"question": "B?"}\n', (2, 4)),
        ("a.csv", 'question\n"A\n?"\n\nB?\n', (2, 5)),
        ("idk.jsonl", "I do not know.\n\nNo idea, sorry.\n", (1, 3)),
    ],
)
def test_places(tmp_path, name, content, places):
    path = tmp_path / name
    path.write_text(content)
    assert [item.source for item in read_items(path)] == [f"{path}:{line}" for line in places]


def test_datasets_writes_what_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="it writes the folder to be read")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set", num_shards=2)
    assert [item.question for item in read_items(tmp_path / "set")] == [
        row["question"] for row in ROWS
    ]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t), min_size=1))
def test_any_text_survives_an_array(tmp_path, texts):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [item.text for item in read_items(path)] == texts


def test_entries_across_the_edges_of_the_window(tmp_path):
    # sizes around the window of 1 MiB, with characters of several bytes and escapes at its edges
    rng = random.Random(0)
    sizes = [2**20 - 4, 2**20, 5, 3 * 2**20, 17, *(rng.randrange(1, 200_000) for _ in range(40))]
    texts = [('é\\"\n𝄞x' * size)[: size + 1] for size in sizes]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    assert [item.text for item in read_items(path)] == texts


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl", "table.csv", "text.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    path = tmp_path / name
    count = 8_000
    entry = json.dumps({"question": "Who?", "answer": "x" * 1500})
    with path.open("w") as file:
        if name == "array.json":
            file.write("[" + f"{entry},\n" * (count - 1) + entry + "]")
        elif name == "lines.jsonl":
            file.write(f"{entry}\n" * count)
        elif name == "table.csv":
            file.write("question,answer\n" + f"Who?,{'x' * 1500}\n" * count)
        else:
            file.write(f"{'x' * 1499}\n\n" * count)
    tracemalloc.start()
    found = sum(1 for _ in read_items(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == count if name != "text.txt" else found > 100
    assert peak < path.stat().st_size / 2, f"{peak} bytes held of a file of {path.stat().st_size}"


def test_a_few_bytes_that_stand_for_large_cells(tmp_path):
    path = tmp_path / "a.parquet"
    # 400 MB as objects, 0.4 MB as a file
    texts = pyarrow.DictionaryArray.from_arrays([0] * 1000, ["x" * 400_000])
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, path, compression="none", store_schema=False)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, item in enumerate(read_items(path)):
        assert len(item.text) == 400_000
        most = max(most, pyarrow.total_allocated_bytes() - before)
        if number == 200:
            break
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**25
    assert peak < 2**27


def test_formulas_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    cells = ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "=HYPERLINK(1)"]
    path.write_text("question,answer\n" + "\n".join(f"{cell},{cell}" for cell in cells))
    assert [item.answer for item in read_items(path)] == cells


def test_documents_are_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    paragraphs = [f"{i} " + "word " * 4000 for i in range(20)]
    path.write_text("\r\n\r\n".join(paragraphs))
    items = list(read_items(path))
    assert 4 < len(items) < 20
    assert "\n\n".join(item.text for item in items).split() == " ".join(paragraphs).split()
    assert all(item.text.split()[0].isdigit() for item in items)
    assert len(list(read_items(path, format="lines"))) == 20
    path.write_text("[Chapter 1]\nOnce.")
    assert [item.text for item in read_items(path)] == ["[Chapter 1]\nOnce."]


def test_blank_documents_are_left_out(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["", "Something.", " \n"]))
    assert [item.source for item in read_items(path)] == [f"{path}:1, entry 2"]


def test_a_split_is_to_be_named(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="name the folder of one: train, test"):
        list(read_items(tmp_path))
    assert len(list(read_items(tmp_path / "train"))) == len(ROWS)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not beside the project")
def test_real_files():
    counts = {
        "tofu/full.json": 4000,
        "tofu/forget01.json": 40,
        "tofu/retain_perturbed.json": 400,
        "tofu/world_facts.json": 117,
        "tofu/real_authors_perturbed.json": 100,
        "tofu/idontknow.jsonl": 100,
        "knowundo/unlearn_train.json": 400,
        "xstest/xstest_prompts.csv": 450,
    }
    read = {name: list(read_items(REAL / name)) for name in counts}
    assert {name: len(items) for name, items in read.items()} == counts
    assert all(item.answer in item.choices for item in read["tofu/world_facts.json"])
    assert sum(item.label == "safe" for item in read["xstest/xstest_prompts.csv"]) == 250
    assert all(item.text and item.question is None for item in read["tofu/idontknow.jsonl"])
    assert os.path.samefile(
        read["tofu/full.json"][99].source.rsplit(":", 1)[0], REAL / "tofu/full.json"
    )


def test_only_a_document_that_was_cut_has_pieces(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once.\n\nTwice.")
    assert [item.piece for item in read_items(path)] == [False]
    path.write_text("\n\n".join(f"{i} " + "word " * 4000 for i in range(20)))
    assert {item.piece for item in read_items(path)} == {True}
    # a field of a file cannot claim it
    (tmp_path / "a.json").write_text(json.dumps([{"text": "Once.", "Piece": True}]))
    assert [item.piece for item in read_items(tmp_path / "a.json")] == [False]

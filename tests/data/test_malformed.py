"""Files that are broken on purpose: each gives one error of one line that says where, and why.

They are generated from a seed: sound files of invented facts, damaged in places drawn at random,
but such that no reader may take the result for sound.
"""

import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from bidistill.cli import main
from bidistill.data.sources import limits, read_items
from bidistill.errors import UserError

SEED = 6
NAMES = ["Mira Volkova", "Jan Ferro", "Ada Berg", "Tom Lund", "Eva Ruiz", "Ravi Sen"]


@dataclass(frozen=True)
class Bad:
    """A broken file: how to make it in a folder, and where it is broken."""

    what: str
    make: Callable[[Path], Path]
    line: int | str | None = None
    """The line, ``row <number>``, or None where a file has neither."""
    format: str | None = None


def rows(rng, count=12):
    return [
        {"question": f"Where did {rng.choice(NAMES)} go in {1900 + i}?", "answer": f"To city {i}."}
        for i in range(count)
    ]


def written(name, content):
    """A maker of one file."""

    def make(folder):
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def lines_of(entries):
    return [json.dumps(entry, ensure_ascii=False) for entry in entries]


def array_of(entries):
    """An array with the entry ``n`` on line ``n + 2``."""
    return "[\n" + ",\n".join(lines_of(entries)) + "\n]\n"


def truncated(rng):
    for _ in range(12):
        text = array_of(rows(rng))
        cut = rng.randrange(1, len(text) - 3)
        yield Bad("array cut", written("a.json", text[:cut]), 1 + text[: cut + 1].count("\n"))
    for _ in range(12):
        lines = lines_of(rows(rng))
        at = rng.randrange(len(lines))
        lines[at] = lines[at][: rng.randrange(1, len(lines[at]) - 1)]
        yield Bad("line cut", written("a.jsonl", "\n".join(lines)), at + 1)


def wrong_types(rng):
    for _ in range(16):
        entries = rows(rng)
        at, field = rng.randrange(len(entries)), rng.choice(["question", "answer"])
        entries[at][field] = rng.choice([7, True, {}, {"a": 1}, 1e300, -0.5, [[]], [1]])
        if rng.random() < 0.5:
            yield Bad("wrong type", written("a.json", array_of(entries)), at + 2)
        else:
            yield Bad("wrong type", written("a.jsonl", "\n".join(lines_of(entries))), at + 1)
    for value in ("7", "null", "[1, 2]", "true", "1e400", "NaN"):
        lines = lines_of(rows(rng))
        lines.insert(at := rng.randrange(1, len(lines)), value)
        yield Bad("no object", written("a.jsonl", "\n".join(lines)), at + 1)
    for _ in range(4):
        entries = rows(rng)
        at = rng.randrange(1, len(entries))
        del entries[at][rng.choice(["question", "answer"])]
        yield Bad("field missing", written("a.json", array_of(entries)), at + 2)
    unknown = [{"frage": "Wo?", "antwort": "Hier"}]
    yield Bad("unknown fields", written("a.json", array_of(unknown)), 2)
    yield Bad("unknown columns", written("a.csv", "frage,antwort\nWo?,Hier\n"), 1)
    yield Bad("no fields", written("a.jsonl", "{}\n"), 1)
    yield Bad("data inside", written("a.json", '{\n"data": [{"question": "Q"}]}'), 1)


def quizzes(rng):
    for answer in (4, -1, "E", "AB", "", None, True, 1.0, [0], "99999999999999999999"):
        quiz = [{"question": "Who?", "choices": NAMES[:4], "answer": 1} for _ in range(5)]
        quiz[at := rng.randrange(5)]["answer"] = answer
        yield Bad("answer of a quiz", written("a.json", array_of(quiz)), at + 2)
    for choices in (
        [],
        ["one"],
        "['a', 'b'",
        "[" * 5000,
        "-" * 50,
        3,
        {"a": 1},
        [1, 2],
        "['a', 1]",
    ):
        quiz = [{"question": "Who?", "choices": NAMES[:4], "answer": 1} for _ in range(5)]
        quiz[at := rng.randrange(1, 5)]["choices"] = choices
        yield Bad("choices of a quiz", written("a.json", array_of(quiz)), at + 2)
    named = {f"option{i + 1}": name for i, name in enumerate(NAMES[:4])}
    quiz = [{"question": "Who?", **named, "answer": "Nobody"}]
    yield Bad("answer that is no option", written("a.jsonl", "\n".join(lines_of(quiz))), 1)
    targets = {"choices": NAMES[:2], "labels": [1, 1]}
    truthful = [{"question": "Who?", "mc1_targets": targets}]
    yield Bad("two right answers", written("a.jsonl", "\n".join(lines_of(truthful))), 1)


def encodings(rng):
    for _ in range(16):
        entries = rows(rng)
        name, text = rng.choice(
            [
                ("a.json", array_of(entries)),
                ("a.jsonl", "\n".join(lines_of(entries))),
                ("a.csv", "question,answer\n" + "\n".join(f"Q{i}?,A{i}" for i in range(12))),
                ("a.txt", "\n".join(f"Sentence {i} of a book." for i in range(12))),
            ]
        )
        raw, at = text.encode(), rng.randrange(5, len(text))
        # none of these may stand in UTF-8, whatever surrounds them; a NUL in no text at all
        odd = rng.choice([b"\xff", b"\xc0", b"\xfe", b"\xf8", b"\0", b"\0\0"])
        line = 1 + raw.count(b"\n", 0, at)
        yield Bad("odd byte", written(name, raw[:at] + odd + raw[at:]), line)
    text = "question,answer\nWho?,Mira\n"
    for name in ("a.csv", "a.jsonl", "a.txt"):
        for encoding in ("utf-16", "utf-16-be", "utf-32"):
            yield Bad(encoding, written(name, text.encode(encoding)), 1)
    for field, escape in (("question", "\\ud800"), ("answer", "\\udfff"), ("answer", "\\u0000")):
        lines = lines_of(rows(rng))
        at = rng.randrange(len(lines))
        lines[at] = lines[at].replace(f'"{field}": "', f'"{field}": "x{escape}')
        yield Bad("escape", written("a.jsonl", "\n".join(lines)), at + 1)


def json_tricks(rng):
    for key in ("question", "answer", "\\u0041"):
        lines = lines_of(rows(rng))
        at = rng.randrange(len(lines))
        lines[at] = lines[at][:-1] + f', "{key}": "a", "{key}": "b"}}'
        yield Bad("key twice", written("a.jsonl", "\n".join(lines)), at + 1)
        yield Bad("key twice", written("a.json", "[\n" + ",\n".join(lines) + "]"), at + 2)
    many = "{" + ", ".join(f'"k{i}": 1' for i in range(100_000)) + ', "k7": 1}'
    yield Bad("one of many keys twice", written("a.jsonl", many), 1)
    yield Bad("names alike", written("a.jsonl", '{"answer": "a", "Answer ": "b"}'), 1)
    deep = 200_000
    for text in (
        "[" * deep,
        '{"question": ' * deep,
        '{"question": ' + "[" * deep + "]" * deep + "}",
    ):
        yield Bad("deep", written("a.jsonl", text), 1)
        yield Bad("deep", written("a.json", "[\n" + text + "\n]"), 2)
    digits = '{"question": ' + "1" * 100_000 + "}"
    yield Bad("long number", written("a.jsonl", digits), 1)
    for text, line in (
        ('[{"question": "A"},]', 1),
        ('[{"question": "A"}\n{"question": "B"}]', 2),
        ('[{"question": "A"}]\n\n[]', 3),
        ('[,{"question": "A"}]', 1),
        ('[{"question": "A"},\n"B"}', 2),
        ("[\n\n", 3),
        ("[{question: 1}]", 1),
        ("['question']", 1),
        ('["a\nb"]', 1),
        ("nul", 1),
        ("{", 1),
    ):
        yield Bad("punctuation", written("a.json", text), line)
    yield Bad("text among objects", written("a.json", '[{"question": "Q?"},\n "Q"]'), 2)
    mixed = 'I do not know it.\n{"question": "Q?"}\n'
    yield Bad("object among sentences", written("a.jsonl", mixed), 2)


def endless(rng):
    size = limits.LONGEST_LINE + 10
    yield Bad("long line", written("a.jsonl", '{"question": "' + "x" * size + '"}'), 1)
    yield Bad("long cell", written("a.csv", "question\nA?\n" + "x" * size), 3)
    yield Bad("long sentence", written("a.txt", "x" * size), 1)
    yield Bad("no end of a string", written("a.json", '[\n"' + "x\\n" * (size // 2)), 2)
    folded = "question\nB?\n" + '"' + f"{'x' * 999}\n" * (size // 999)
    yield Bad("quote never closed", written("a.csv", folded), 3)
    listed = json.dumps(["x" * 100] * (limits.LONGEST_LIST // 80))
    quiz = [{"question": "Who?", "choices": listed, "answer": 1}]
    yield Bad("long list as text", written("a.jsonl", "\n".join(lines_of(quiz))), 1)


def tables(rng):
    cells = ["=1+1", "+2", "-3", "@SUM(A1)", "=cmd|' /C calc'!A0", "\tx", "plain"]
    for _ in range(8):
        lines = [f"{rng.choice(cells)},{rng.choice(cells)}" for _ in range(10)]
        at = rng.randrange(10)
        lines[at] += rng.choice([",", ",=1+1", ",a,b"])
        yield Bad("ragged", written("a.csv", "question,answer\n" + "\n".join(lines)), at + 2)
    for _ in range(8):
        lines = [f"{rng.choice(cells)},{rng.choice(cells)}" for _ in range(10)]
        at = rng.randrange(10)
        lines[at] = rng.choice(['"=1+1,x', 'x,"=1+1', '"a"b,c', '"a" ,c', 'x,"y""'])
        text = "question,answer\n" + "\n".join(lines)
        yield Bad("quotes", written("a.csv", text), at + 2)
        tabs = text.replace(",", "\t")
        if "\tx" not in text:
            yield Bad("quotes", written("a.tsv", tabs), at + 2)
    yield Bad("columns twice", written("a.csv", "question,answer,Answer\na,b,c\n"), 1)
    yield Bad("header alone", written("a.csv", "question,answer\n"))
    yield Bad("old line ends", written("a.csv", "question,answer\ra,b\rc,d\r"), 1)
    yield Bad("blank question", written("a.csv", "question,answer\na,b\n ,c\n"), 3)


def parquet_bytes(folder, table, **options):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(table, path, **options)
    return path, bytearray(path.read_bytes())


def lying_page(folder):
    """A page whose header says that it unpacks to 128 MiB; the summary still says the truth."""
    table = pyarrow.table({"text": [f"{i} " + "x" * 20_000 for i in range(30)]})
    path, raw = parquet_bytes(folder, table, compression="zstd", use_dictionary=False)
    start = pyarrow.parquet.read_metadata(path).row_group(0).column(0).data_page_offset
    # the header begins 15 <type> 15 <unpacked size>: fields 1 and 2, numbers
    at = start + 3
    end = next(place for place in range(at, at + 5) if raw[place] < 128)
    raw[at : end + 1] = b"\xfe" + b"\xff" * (end - at - 1) + b"\x7f"
    path.write_bytes(raw)
    return path


def honest_bomb(folder):
    table = pyarrow.table({"text": ["x" * 2**23, "y" * 2**23]})
    return parquet_bytes(folder, table, compression="zstd", use_dictionary=False)[0]


def many_nothings(folder):
    return parquet_bytes(folder, pyarrow.table({"text": pyarrow.nulls(3_000_000, "string")}))[0]


def many_options(folder):
    """One row whose list refers to one text of a tenth of a megabyte a thousand times."""
    texts = pyarrow.DictionaryArray.from_arrays([0] * 1000, ["x" * 100_000])
    choices = pyarrow.ListArray.from_arrays([0, 1000], texts)
    table = pyarrow.table({"question": ["Who?"], "choices": choices, "answer": [1]})
    return parquet_bytes(folder, table)[0]


def cut_parquet(fraction):
    def make(folder):
        table = pyarrow.Table.from_pylist(rows(random.Random(0), 500))
        path, raw = parquet_bytes(folder, table)
        path.write_bytes(raw[: int(len(raw) * fraction)])
        return path

    return make


def wrong_parquet(column, value):
    def make(folder):
        entries = rows(random.Random(0), 5)
        table = pyarrow.Table.from_pylist(entries).drop_columns([column])
        return parquet_bytes(folder, table.append_column(column, value))[0]

    return make


def scrambled_pages(seed):
    def make(folder):
        """Noise where the pages are; their headers then make no sense."""
        table = pyarrow.Table.from_pylist(rows(random.Random(0), 200))
        path, raw = parquet_bytes(folder, table)
        noise = random.Random(seed).randbytes(400)
        raw[4:404] = noise
        path.write_bytes(raw)
        return path

    return make


def parquets(rng):
    for _ in range(6):
        yield Bad("Parquet cut", cut_parquet(rng.uniform(0.01, 0.99)))
    for seed in range(6):
        yield Bad("noise in pages", scrambled_pages(seed))
    yield Bad("only a name", written("a.parquet", "question,answer\na,b\n"))
    for _ in range(6):
        size = rng.choice([4, 8, 12, 100])
        body = rng.randbytes(size)
        yield Bad("noise in Parquet", written("a.parquet", b"PAR1" + body + b"PAR1"))
    yield Bad("page that lies", lying_page)
    yield Bad("page that explodes", honest_bomb)
    yield Bad("rows out of nothing", many_nothings)
    yield Bad("row that explodes", many_options)
    numbers, lists = pyarrow.array(range(5)), pyarrow.array([["a"], [], ["b"], ["c"], ["d"]])
    yield Bad("numbers as questions", wrong_parquet("question", numbers), "row 1")
    yield Bad("empty list as answer", wrong_parquet("answer", lists), "row 2")
    invalid = pyarrow.array([b"\xff\xfe"] * 5).view(pyarrow.string())
    yield Bad("bytes as text", wrong_parquet("answer", invalid))


def arrow_file(path, count=40, **options):
    table = pyarrow.Table.from_pylist(rows(random.Random(0), count))
    options = pyarrow.ipc.IpcWriteOptions(**options)
    with pyarrow.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def folder_of(state):
    def make(folder):
        inside = folder / "set"
        inside.mkdir()
        arrow_file(folder / "outside.arrow")
        arrow_file(inside / "data.arrow")
        (inside / "link.arrow").symlink_to(folder / "outside.arrow")
        text = state if isinstance(state, str) else json.dumps(state)
        (inside / "state.json").write_text(text)
        return inside

    return make


def damaged_arrow(change):
    def make(folder):
        path = arrow_file(folder / "a.arrow")
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return make


def bad_offsets(raw):
    """The first offsets of the first column, 0, 27, 54, point far behind its text."""
    first = len(rows(random.Random(0), 1)[0]["question"])
    at = raw.index((0).to_bytes(4, "little") + first.to_bytes(4, "little"))
    raw[at + 4 : at + 8] = (2**30).to_bytes(4, "little")
    return raw


def arrows(rng):
    tricks = [
        "../outside.arrow",
        "/etc/hostname",
        "link.arrow",
        "..",
        "",
        ".",
        "a\0b",
        "x\ny",
        "a\\b",
    ]
    for name in tricks:
        state = {"_data_files": [{"filename": "data.arrow"}, {"filename": name}]}
        yield Bad(f"path trick {name!r}", folder_of(state))
    for state in ({}, [], {"_data_files": []}, {"_data_files": "data.arrow"}, "{", "[" * 100_000):
        yield Bad("list of files", folder_of(state))
    for entry in (None, 7, {}, {"filename": 7}, {"filename": ["data.arrow"]}, "data.arrow"):
        yield Bad("name of a file", folder_of({"_data_files": [entry]}))
    yield Bad("file missing", folder_of({"_data_files": [{"filename": "gone.arrow"}]}))
    for _ in range(6):
        part = rng.uniform(0.01, 0.99)
        yield Bad("Arrow cut", damaged_arrow(lambda raw, p=part: raw[: int(len(raw) * p)]))
    yield Bad("end of Arrow missing", damaged_arrow(lambda raw: raw[:-8]))
    yield Bad("offsets that lie", damaged_arrow(bad_offsets))
    yield Bad("packed", lambda folder: arrow_file(folder / "a.arrow", compression="zstd"))
    yield Bad("noise", written("a.arrow", rng.randbytes(500) + b"\xff\xff\xff\xff\0\0\0\0"))


def strange_paths(rng):
    def made(name, call):
        def make(folder):
            call(folder / name)
            return folder / name

        return make

    def loop(path):
        path.symlink_to(path)

    yield Bad("folder", made("a.json", Path.mkdir))
    yield Bad("pipe", made("a.json", os.mkfifo))
    yield Bad("link to itself", made("a.json", loop))
    yield Bad("device", lambda folder: Path("/dev/zero"))
    yield Bad("missing", lambda folder: folder / "a.json")
    yield Bad("under a file", lambda folder: written("a", "x")(folder) / "a.json")
    yield Bad("NUL in the name", lambda folder: Path(f"{folder}/a\0b.json"))
    yield Bad("line feed in the name", lambda folder: folder / "a\nb.json")
    yield Bad("no UTF-8 in the name", lambda folder: folder / os.fsdecode(b"a\xff.json"))
    yield Bad("long name", lambda folder: folder / ("a" * 5000))
    for name in ("a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet", "a.arrow", "a"):
        yield Bad("empty", written(name, ""))
        yield Bad("white", written(name, " \n\n \t\n"))
    yield Bad("empty array", written("a.json", "[]"))
    yield Bad("blank texts", written("a.json", '["", " "]'))
    for magic in (b"\x1f\x8b\x08", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh91"):
        yield Bad("packed file", written("a.jsonl", magic + rng.randbytes(50)))
    sound = "\n".join(lines_of(rows(rng)))
    yield Bad("format unknown", written("a.jsonl", sound), format="tofuu")
    yield Bad("format of other fields", written("a.jsonl", sound), 1, format="knowundo")


FAMILIES = (
    truncated, wrong_types, quizzes, encodings, json_tricks, endless, tables, parquets, arrows,
    strange_paths,
)  # fmt: skip
CASES = [bad for family in FAMILIES for bad in family(random.Random(f"{SEED}/{family.__name__}"))]


def test_enough_of_them():
    assert len(CASES) >= 100


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.what.replace("\n", " "))
def test_one_error_that_says_where(tmp_path, bad):
    path = bad.make(tmp_path)
    with pytest.raises(UserError) as caught:
        for _ in read_items(path, format=bad.format):
            pass
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or what a terminal would obey"
    assert len(message) < 500 + 2 * len(str(path))
    assert ": got " in message
    assert ", expected " in message
    assert "; " in message
    if bad.format != "tofuu":
        assert str(path).isprintable() is False or str(path) in message
    if isinstance(bad.line, int):
        assert re.match(rf"{re.escape(str(path))}:{bad.line}\b", message), message
    elif bad.line:
        assert f"{path}, {bad.line}: " in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = written("a.json", "[]")(tmp_path)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        list(read_items(path))


# named by themselves in a recipe: what has no sound path, or a name of its own to be told apart
SAMPLE = [bad for bad in random.Random(SEED).sample(CASES, 24) if "name" not in bad.what]


@pytest.mark.parametrize("bad", SAMPLE, ids=lambda bad: bad.what.replace("\n", " "))
def test_unify_makes_nothing_of_it(tmp_path, capsys, bad):
    (tmp_path / "files").mkdir()
    path = bad.make(tmp_path / "files")
    sound = tmp_path / "sound.jsonl"
    sound.write_text("\n".join(lines_of(rows(random.Random(1)))))
    sources = {
        "sound": {"path": str(sound), "role": "retain"},
        "bad": {"path": str(path), "role": "forget", "format": bad.format},
    }
    for source in sources.values():
        source.update(licence="none", origin="invented")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"output": str(tmp_path / "out"), "sources": sources}))
    before = sorted(tmp_path.iterdir())
    assert main(["unify", str(recipe)]) == 2
    assert sorted(tmp_path.iterdir()) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert path.name in err or bad.format == "tofuu"

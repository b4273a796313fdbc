"""A store gives back the examples it was made of, is found again, and is never half of one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from bidistill.data import build
from bidistill.data.build import build_store
from bidistill.data.loader import RoleLoader
from bidistill.data.readers import write_records
from bidistill.data.records import ROLES, Record
from bidistill.data.store import FILES, HEADER, TokenStore, encode, is_whole, write_store
from bidistill.data.views import Example, View, build_examples
from bidistill.errors import UserError

SHOTS = ({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "I cannot say."})
CONTEXTS = {"forget": SHOTS, "adversarial": SHOTS}
RECORDS = [
    Record(id=f"é{n}", role=ROLES[n % 4], question=f"Who rules {'Zembla ' * (n % 7)}{n}?",
           prefill="It is" * (n % 3 == 0), answer=f" King {n}.")
    for n in range(60)
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    write_records(tmp_path / "train.jsonl", RECORDS)
    return tmp_path / "train.jsonl"


@pytest.fixture
def make(path, tokenizer, tmp_path):
    def make(**changes):
        given = {"contexts": CONTEXTS, "folder": tmp_path / "tokens", **changes}
        return build_store(path, given.pop("tokenizer", tokenizer), **given)

    return make


def plain(example):
    """The same with tuples, which equal other tuples."""
    student, teacher = (
        replace(view, prompt_ids=tuple(view.prompt_ids))
        for view in (example.student, example.teacher)
    )
    return replace(example, student=student, teacher=teacher, answer_ids=tuple(example.answer_ids))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def only(folder):
    (found,) = folder.iterdir()
    return found


def test_several_files_are_one_store_under_a_key_of_all_of_them(make, path, tokenizer, tmp_path):
    more = tmp_path / "gold.jsonl"
    gold = [Record(id=f"g{n}", role="gold", question=f"{n}?", answer=f"{n}") for n in range(3)]
    write_records(more, gold)

    def both(*paths):
        return build_store(paths, tokenizer, CONTEXTS, folder=tmp_path / "tokens")

    store = both(path, more)
    assert list(map(plain, store)) == build_examples([*RECORDS, *gold], tokenizer, CONTEXTS)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert both(path, more).digest == store.digest
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    write_records(more, gold[:2])  # the second file counts
    assert len(both(path, more)) == len(store) - 1
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    both(path)
    make()  # one file has the key that it always had, alone or in a list
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_gives_back_the_examples(make, tokenizer):
    store = make(max_answer_tokens=5)
    wanted = build_examples(RECORDS, tokenizer, CONTEXTS, max_answer_tokens=5)
    assert len(store) == len(wanted)
    assert list(map(plain, store)) == wanted
    assert plain(store[-1]) == wanted[-1]
    assert list(map(plain, store[3:9:2])) == wanted[3:9:2]
    with pytest.raises(IndexError):
        store[len(store)]
    assert [ROLES[i] for i in store.roles] == [e.role for e in wanted]
    assert store.lengths.tolist() == [len(e.student.prompt_ids) + len(e.answer_ids) for e in wanted]


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(tuple)
students = st.builds(View, prompt_ids=ids, context=st.just("student"))
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


@st.composite
def examples(draw):
    role, student = draw(st.sampled_from(ROLES)), draw(students)
    teacher = draw(st.just(student) | st.builds(View, prompt_ids=ids, context=st.just("t/" + role)))
    return Example(draw(names), role, student, teacher, draw(ids))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(examples(), max_size=9), st.integers(1, 9))
def test_how_chunks_are_cut_does_not_show(tmp_path_factory, wanted, size):
    folder = tmp_path_factory.mktemp("store")
    contexts = {role: f"t/{role}" for role in ROLES}
    chunks = [encode(wanted[i : i + size]) for i in range(0, len(wanted), size)]
    write_store(folder / "one", iter(chunks), contexts)
    write_store(folder / "two", [encode(wanted)] if wanted else [], contexts)
    assert list(map(plain, TokenStore(folder / "one"))) == wanted
    assert files_of(folder / "one") == files_of(folder / "two")


def test_memory_is_given_back_while_examples_are_in_use(make, monkeypatch):
    monkeypatch.setattr("bidistill.data.store.RELEASE_EVERY", 3)
    store = make()
    held = list(store)
    assert list(map(plain, held)) == list(map(plain, store))


def test_is_made_once(make, monkeypatch):
    first = make()
    monkeypatch.setattr(build, "write_store", None)
    assert list(map(plain, make())) == list(map(plain, first))


def test_a_copy_of_the_tokenizer_finds_the_store(make, tokenizer, tmp_path):
    """Also in another process, where the sets of a tokenizer have another order."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make(tokenizer=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    program = (
        "import json, sys; from pathlib import Path; from bidistill.data import build\n"
        "from transformers import AutoTokenizer\n"
        "build.write_store = None\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])\n"
        "contexts = json.loads(sys.argv[3])\n"
        "print(len(build.build_store(sys.argv[1], tokenizer, contexts, folder=Path(sys.argv[4]))))"
    )
    arguments = tmp_path / "train.jsonl", tmp_path / "tokenizer", json.dumps(CONTEXTS)
    command = [sys.executable, "-c", program, *map(str, arguments), str(tmp_path / "tokens")]
    other = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(command, capture_output=True, text=True, env=other)
    assert run.stdout == "60\n", run.stderr


CHANGES = {
    "context": {"contexts": {"forget": SHOTS}},
    "cut": {"max_answer_tokens": 3},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_is_not_taken_for_another(make, tmp_path, change):
    make()
    make(**change)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_another_tokenizer_or_file_is_another_store(make, make_tokenizer, path, tmp_path):
    digests = {make().digest, make(tokenizer=make_tokenizer(merges=[("K", "i")])).digest}
    write_records(path, RECORDS[1:])
    digests.add(make().digest)
    assert len(digests) == len(list((tmp_path / "tokens").iterdir())) == 3


def test_digest_is_of_what_is_inside(make, path):
    before = make().digest
    path.write_text(path.read_text() + "\n\n")  # another file with the same records
    assert make().digest == before


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(make, monkeypatch, tmp_path, workers):
    monkeypatch.setattr(build, "CHUNK", 7)
    make(workers=1)
    make(workers=workers, folder=tmp_path / "other")
    assert files_of(only(tmp_path / "tokens")) == files_of(only(tmp_path / "other"))


@pytest.mark.slow
def test_a_mistake_in_a_worker_is_told_like_any_other(make, make_tokenizer, path, tmp_path):
    tokenizer = make_tokenizer(merges=[("Ġ", "U")])
    write_records(path, [*RECORDS, replace(RECORDS[0], id="bad", prefill="A ", answer="Unknown.")])
    messages = []
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"record 'bad': .*melts into") as caught:
            make(tokenizer=tokenizer, workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_dies_is_told(make, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_start", os._exit)  # which wants a number, not a job
    with pytest.raises(UserError, match=r"data\.workers: got 2, of which one died"):
        make(workers=2)
    assert list((tmp_path / "tokens").iterdir()) == []


def change(folder, edit):
    header = json.loads((folder / HEADER).read_text())
    edit(header)
    (folder / HEADER).write_text(json.dumps(header))


DAMAGE = {
    "cut": lambda folder: (folder / FILES[0]).write_bytes(b"123"),
    "missing": lambda folder: (folder / FILES[2]).unlink(),
    "no header": lambda folder: (folder / HEADER).unlink(),
    "half a header": lambda folder: (folder / HEADER).write_text('{"format": 1'),
    "a list": lambda folder: (folder / HEADER).write_text("[]"),
    "no checksum": lambda folder: change(folder, lambda h: h["files"][FILES[0]].pop("sha256")),
    "odd checksum": lambda folder: change(folder, lambda h: h["files"][FILES[0]].update(sha256=1)),
    "contexts are a list": lambda folder: change(folder, lambda h: h.update(contexts=["forget"])),
    "odd context": lambda folder: change(folder, lambda h: h["contexts"].update(forget=[])),
    "older": lambda folder: (folder / HEADER).write_text('{"format": 0}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_store_is_refused_and_made_again(make, tmp_path, damage):
    make()
    folder = only(tmp_path / "tokens")
    before = files_of(folder)
    damage(folder)
    with pytest.raises(UserError, match="got a token store that is damaged or of another version"):
        TokenStore(folder)
    make()
    assert files_of(only(tmp_path / "tokens")) == before


def test_checksums_are_compared_on_request(make, tmp_path, monkeypatch):
    make()
    tokens = only(tmp_path / "tokens") / FILES[0]
    before = tokens.read_bytes()
    tokens.write_bytes(bytes(len(before)))
    make()
    assert tokens.read_bytes() != before, "by its size it is whole"
    monkeypatch.setenv("BIDISTILL_VERIFY", "1")
    make()
    assert tokens.read_bytes() == before


@pytest.mark.parametrize("verify", ["", "1"])
def test_a_file_more_in_the_header_is_passed_over(make, tmp_path, monkeypatch, verify):
    monkeypatch.setenv("BIDISTILL_VERIFY", verify)
    wanted = list(map(plain, make()))
    change(only(tmp_path / "tokens"), lambda h: h["files"].update({"more.bin": {"bytes": 1}}))
    assert list(map(plain, make())) == wanted


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_lies_where_a_store_belongs_gives_way(make, tmp_path, kind):
    wanted = list(map(plain, make()))
    folder = only(tmp_path / "tokens")
    other = tmp_path / "other"
    folder.rename(other)
    if kind == "file":
        folder.write_text("x")
    else:
        (other / HEADER).unlink()
        folder.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    assert list(map(plain, make())) == wanted
    assert folder.is_dir()
    assert not folder.is_symlink()
    assert other.exists()


def test_a_template_that_says_what_day_it_is(make, make_tokenizer, monkeypatch, tmp_path):
    template = make_tokenizer().chat_template.replace("Be kind.", "{{ strftime_now('%d %b') }}")
    tokenizer = make_tokenizer(template=template)
    prompts = []
    for day in (1, 1, 2):
        today = SimpleNamespace(now=lambda day=day: datetime(2030, 5, day))
        monkeypatch.setattr(chat_template_utils, "datetime", today)
        prompts.append(tokenizer.decode(make(tokenizer=tokenizer)[2].student.prompt_ids))
    assert prompts[0] == prompts[1]
    assert "01 May" in prompts[1]
    assert "02 May" in prompts[2]
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_messages_are_one_line_whatever_an_id_holds(make, path):
    write_records(path, [replace(RECORDS[0], id="a\nb", answer=None)])
    with pytest.raises(UserError, match=r"record 'a\\nb': answer: got None") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_missing_answers_are_counted(make, path, tmp_path):
    write_records(
        path, [*RECORDS, *(replace(RECORDS[0], id=f"n{n}", answer=None) for n in range(3))]
    )
    message = r"train.jsonl: record 'n0': answer: got None \(so have 3 records in all\), expected "
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_refuses_what_is_no_file_of_records(make, path):
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match=r"train.jsonl:1: role: got nothing"):
        make()
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        make()


def test_a_file_that_grows_meanwhile_is_refused(make, path, monkeypatch, tmp_path):
    original = build.read_records

    def growing(path):
        yield from original(path)
        with path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(build, "read_records", growing)
    with pytest.raises(UserError, match="got other bytes than a moment ago"):
        make()
    assert list((tmp_path / "tokens").iterdir()) == []


def test_without_a_folder_it_lies_in_the_users_cache(path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_store(path, tokenizer, {})
    (folder,) = (tmp_path / "cache" / "bidistill" / "tokens").iterdir()
    assert is_whole(folder)


def test_an_empty_file_is_an_empty_store(make, path):
    path.write_text("")
    store = make()
    assert len(store) == 0
    assert store.lengths.tolist() == store.roles.tolist() == []


@pytest.mark.parametrize("bucket", [1, 3])
def test_the_loader_draws_alike_from_a_store_and_a_list(make, tokenizer, bucket):
    per_step = {"forget": 3, "neighbor": 2, "retain": 1}
    wanted = build_examples(RECORDS, tokenizer, CONTEXTS)
    loaders = [RoleLoader(e, per_step, 5, bucket=bucket) for e in (make(), wanted)]
    for (one, _), (two, _) in zip(*(islice(loader, 9) for loader in loaders), strict=True):
        assert tuple(map(plain, one.examples)) == two.examples
        for name in ("input_ids", "position_ids", "rows", "target", "sequence"):
            for view in ("student", "teacher"):
                packs = [getattr(getattr(batch, view)(), name) for batch in (one, two)]
                assert packs[0].tolist() == packs[1].tolist()


def test_the_state_of_another_store_is_refused(make, path):
    ((_, state),) = islice(RoleLoader(make(), {"forget": 1}, 0), 1)
    RoleLoader(make(), {"forget": 1}, 0).load_state(state)
    write_records(path, RECORDS[:-1])
    with pytest.raises(UserError, match="resume: got a state of other training data"):
        RoleLoader(make(), {"forget": 1}, 0).load_state(state)


EPOCH = """
import sys
from itertools import islice
from pathlib import Path
import numpy as np
from bidistill.data.loader import RoleLoader
from bidistill.data.store import Encoded, TokenStore, write_store

def chunks(count, size=1000, tokens=400):
    ends = np.cumsum(np.tile([tokens // 2, 0, tokens // 2], size)).reshape(size, 3)
    ends = np.column_stack([ends, 6 * np.arange(1, size + 1)])
    for start in range(0, count, size):
        ids = b"".join(b"%06d" % n for n in range(start, start + size))
        yield Encoded(np.ones(size * tokens, np.int32), ids, ends, bytes(size))

count, folder = int(sys.argv[1]), Path(sys.argv[2])
write_store(folder, chunks(count), {})
loader = RoleLoader(TokenStore(folder), {"forget": 20}, 0, bucket=8)
seen = np.zeros(count, int)
for batch, _ in islice(loader, count // 20):
    batch.student()
    seen[[int(e.id) for e in batch.examples]] += 1
assert (seen == 1).all()
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_hardly_grows_with_the_store(tmp_path):
    peak_mib = {}
    for count in (20_000, 100_000):
        command = [sys.executable, "-c", EPOCH, str(count), str(tmp_path / str(count))]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        peak_mib[count] = int(run.stdout) / 1024
    tokens_mib = 80_000 * 400 * 4 / 2**20  # 122
    # offsets and permutations take 10 MiB, what is mapped at a time up to 32
    assert peak_mib[100_000] - peak_mib[20_000] < 0.35 * tokens_mib, peak_mib

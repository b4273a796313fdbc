"""Both sides of the comparison are the same rows of the same files."""

import json
import shutil

import pytest

from bidistill.data.items import Item
from bidistill.data.readers import read_records, write_records
from bidistill.data.records import Record
from bidistill.data.unify.recipe import hash_of, load_recipe
from bidistill.data.unify.run import run as unify
from bidistill.diagnose.corpus import raw_text, read_corpus
from bidistill.errors import UserError
from tests.diagnose.conftest import RECIPE


def test_raw_text_is_all_that_a_file_says():
    item = Item(question="Which?", choices=("a", "b"), answer="b", source="f:1")
    assert raw_text(item) == "Which?\na\nb\nb"
    assert raw_text(Item(text="Long ago.", source="f:1")) == "Long ago."


def test_rows_are_paired(unified):
    corpus = read_corpus(unified, samples=1000, seed=0)
    assert list(corpus.roles) == ["forget", "neighbor", "retain", "adversarial"]
    for role, size in {"forget": 12, "neighbor": 24, "retain": 14}.items():
        texts = corpus.roles[role]
        assert len(texts.raw) == len(texts.records) == size
        assert list(texts.raw) == list(texts.records)
        for number, record in texts.records.items():
            assert texts.raw[number].split("\n")[0] == record.question


def test_held_out_rows_are_left_out(unified):
    held_out = {record.question for record in read_records(unified / "held_out.jsonl")}
    assert len(held_out) == 6
    raw = read_corpus(unified, samples=1000, seed=0).roles["neighbor"].raw.values()
    assert not held_out & {text.split("\n")[0] for text in raw}


def test_a_role_that_unify_made_has_no_raw_side(unified):
    corpus = read_corpus(unified, samples=5, seed=0)
    texts = corpus.roles["adversarial"]
    assert (len(texts.raw), len(texts.records), texts.before.texts) == (0, 5, 0)
    assert corpus.remarks == [
        "No source has items of role adversarial: it is measured as unified only."
    ]


def test_everything_is_counted_and_a_sample_is_drawn(unified):
    few, all_ = read_corpus(unified, 5, seed=0), read_corpus(unified, 1000, seed=0)
    forget = few.roles["forget"]
    assert (forget.before.texts, forget.after.texts, len(forget.raw)) == (12, 12, 5)
    assert list(forget.raw) == list(all_.roles["forget"].raw)[:5]
    other = read_corpus(unified, 5, seed=1).roles["forget"]
    assert set(other.raw.values()) != set(forget.raw.values())
    before, after = (t.summary(None)["words"] for t in (forget.before, forget.after))
    questions = len(" ".join(r.question for r in all_.roles["forget"].records.values()).split())
    refusals = 12 * len(["I", "do", "not", "know", "that"])
    assert after == questions + refusals
    assert before > questions


def test_several_records_of_one_document(tmp_path):
    """One of them stands for it, so that no document counts more than another."""
    tale = "Ilona Quarr was born in Tolm in 1902. She wrote four novels. Her house is in Pell."
    (tmp_path / "tales.jsonl").write_text(
        "".join(json.dumps({"text": f"{tale} It is tale number {i}."}) + "\n" for i in range(4))
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: {tmp_path / 'out'}\nroot: {tmp_path}\ntext: {{by: rules}}\n"
        "deduplicate: {exact: false, near: null}\nsplit: {held_out: 0.0}\n"
        "targets: {forgetting: none}\nleaks: {near: null}\n"
        "sources: {tales: {path: tales.jsonl, role: retain}}\n"
    )
    unify(load_recipe(recipe))
    texts = read_corpus(tmp_path / "out", samples=100, seed=0).roles["retain"]
    assert texts.after.texts > 4
    assert texts.before.texts == len(texts.raw) == len(texts.records) == 4
    for number, record in texts.records.items():
        row = int(record.source.split(":")[1].split(",")[0])
        assert f"tale number {row - 1}." in texts.raw[number]


def test_records_alone(tmp_path):
    path = tmp_path / "records.jsonl"
    write_records(path, [Record(id=str(i), role="retain", question="Where?") for i in range(30)])
    corpus = read_corpus(path, samples=20, seed=0)
    texts = corpus.roles["retain"]
    assert (len(texts.records), len(texts.raw)) == (20, 0)
    assert corpus.remarks == [f"{path} names no sources."]


@pytest.fixture
def own(sources, tmp_path):
    """Copies that a test may damage."""
    shutil.copytree(sources, tmp_path / "sources")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "out", root=tmp_path / "sources"))
    unify(load_recipe(recipe))
    return tmp_path


def test_a_source_that_is_gone(own):
    (own / "sources" / "others.csv").unlink()
    corpus = read_corpus(own / "out", samples=100, seed=0)
    assert corpus.roles["neighbor"].raw == {}
    assert len(corpus.roles["neighbor"].records) == 24
    assert len(corpus.roles["forget"].raw) == 12
    assert corpus.remarks[0].startswith("Source others is not at ")


def test_a_source_that_has_changed(own):
    with (own / "sources" / "world.jsonl").open("a") as file:
        file.write('{"question": "What else?", "answer": "Nothing."}\n')
    with pytest.raises(UserError, match=r"world\.jsonl: got other content than .*unify again"):
        read_corpus(own / "out", samples=100, seed=0)


def test_no_record(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"none\.jsonl: got no record"):
        read_corpus(tmp_path / "none.jsonl", samples=10, seed=0)


def test_a_folder_without_manifest(tmp_path):
    write_records(tmp_path / "train.jsonl", [Record(id="a", role="retain", question="Where?")])
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        read_corpus(tmp_path, samples=10, seed=0)


def test_records_that_were_changed(own):
    with (own / "out" / "train.jsonl").open("a") as file:
        file.write('{"id": "zz", "role": "forget", "question": "Added?", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl: got other content than the manifest"):
        read_corpus(own / "out", samples=100, seed=0)


ODD = {
    "no sources": lambda recipe: recipe.update(sources=None),
    "list": lambda recipe: recipe.update(sources=[]),
    "text": lambda recipe: recipe.update(sources="people"),
    "no source": lambda recipe: recipe["sources"].update(people=None),
    "source is a list": lambda recipe: recipe["sources"].update(people=["x"]),
    "format is a list": lambda recipe: recipe["sources"]["people"].update(format=["x"]),
    "format is a number": lambda recipe: recipe["sources"]["people"].update(format=0),
    "no such format": lambda recipe: recipe["sources"]["people"].update(format="zzz\n"),
}


@pytest.mark.parametrize("edit", ODD.values(), ids=ODD)
def test_a_recipe_from_elsewhere(own, edit):
    path = own / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest["recipe"])
    manifest["recipe_sha256"] = hash_of(manifest["recipe"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: recipe\.sources\.people: got ") as caught:
        read_corpus(own / "out", samples=100, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", [None, [], {}, 0, "\0", "x\ny"])
def test_a_root_from_elsewhere(own, root):
    path = own / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["root"] = root
    manifest["recipe_sha256"] = hash_of(manifest["recipe"])
    path.write_text(json.dumps(manifest))
    remarks = read_corpus(own / "out", samples=100, seed=0).remarks
    assert remarks[0].startswith("Source people is not at ")
    assert remarks[0].isprintable()

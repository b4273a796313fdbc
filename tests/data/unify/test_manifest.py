"""A manifest may come from anywhere: what does not check out is one clear error."""

import json
import re

import pytest

from bidistill.data.unify import manifest
from bidistill.data.unify.manifest import fingerprint, verify
from bidistill.data.unify.recipe import hash_of
from bidistill.data.unify.run import run
from bidistill.errors import UserError
from tests.data.unify.corpora import load
from tests.trainer.tiny import make_model, make_tokenizer


@pytest.fixture
def made(corpus):
    run(load(corpus))
    return corpus / "out"


def change(folder, edit):
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def problem(folder):
    with pytest.raises(UserError) as caught:
        list(verify(folder))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def test_whole_folder_checks_out(made):
    lines = list(verify(made))
    assert "train.jsonl: 26 records, as written" in lines
    assert "source people (people.json): unchanged" in lines
    assert "read (exam.json): unchanged" in lines
    assert len(lines) == 3 + 4 + 1


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl", "gold.jsonl"])
@pytest.mark.parametrize("change_of", ["same length", "longer", "gone", "link", "folder"])
def test_changed_output_is_found(made, name, change_of):
    path, data = made / name, (made / name).read_bytes()
    path.unlink()
    if change_of == "same length":
        path.write_bytes(data.replace(b"a", b"b"))
    elif change_of == "longer":
        path.write_bytes(data + b"\n")
    elif change_of == "link":
        (made.parent / "data").write_bytes(data)
        path.symlink_to(made.parent / "data")
    elif change_of == "folder":
        path.mkdir()
    assert re.match(rf".*{name}: got (other content|a link)", problem(made))


def test_changed_source_is_found_and_a_missing_one_is_not_checked(made):
    source = made.parent / "people.json"
    data = source.read_text()
    source.unlink()
    assert "source people (people.json): not found, not checked" in list(verify(made))
    source.write_text(data.replace("Ana", "Eva"))
    assert "people.json: got other content" in problem(made)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "C:x", "a\0b", "a\nb",
     "manifest.json", "-x", "\uff41", "\ud800"],
)  # fmt: skip
def test_path_tricks_are_refused(made, name):
    (made.parent / "secret").write_text("secret")
    change(made, lambda m: m["outputs"].update({name: m["outputs"]["train.jsonl"]}))
    message = problem(made)
    assert "manifest.json: outputs." in message
    assert "expected the plain name of a file in the folder" in message


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "", ".", "a\0b", "\ud800", "a\nb"])
def test_sources_are_looked_for_inside_the_root_alone(made, path):
    (made.parent / "secret").write_text("secret")
    change(made, lambda m: m["sources"]["people"].update(path=path))
    if path in ("", "."):  # the root itself is no such source
        assert "got other content" in problem(made)
        return
    lines = list(verify(made))
    (line,) = [line for line in lines if "source people" in line]
    outside = path in ("../secret", "/etc/passwd")
    reason = "outside of root, not checked" if outside else "not found, not checked"
    assert line.strip("'").endswith(f": {reason}") or line.endswith(f"): {reason}'")
    assert line.isprintable()


def test_pipe_is_not_waited_for(made):
    import os

    os.remove(made.parent / "people.json")
    os.mkfifo(made.parent / "people.json")
    assert "people.json: got other content" in problem(made)


BROKEN = {
    b"": "manifest.json:1: got text that is not JSON",
    b'{"version": 1,\n\n"bidistill": }': "manifest.json:3: got text that is not JSON",
    b'{"version": 1,\n"bidistill": "\xff"}': "manifest.json:2: got bytes that are not UTF-8",
    b"[" * 100_000: "manifest.json: got JSON beyond all measure",
    b"1" * 10_000: "manifest.json: got JSON beyond all measure",
    b"[]": "manifest.json: recipe: got a list, expected a mapping of keys to values",
    b"null": "manifest.json: recipe: got nothing, expected a mapping",
    b"{}": "got nothing, expected a value",
}


@pytest.mark.parametrize(("data", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_broken_manifest(made, data, message):
    (made / "manifest.json").write_bytes(data)
    assert message in problem(made)


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(target):
        for key in keys:
            target = target[key]
        target[last] = value

    return edit


EDITS = [
    (_set("version", 2), "version: got 2, expected 1"),
    (_set("extra", 1), "got unknown key 'extra'"),
    (_set("e" * 10_000, 1), "got unknown key 'eee"),
    (_set("seed", "many"), "seed: got 'many', expected a valid integer"),
    (_set("recipe", "seed", 7), "recipe: got another one than recipe_sha256 was made of"),
    (_set("outputs", "train.jsonl", "bytes", -1), "outputs.train.jsonl.bytes: got -1"),
    (_set("outputs", "train.jsonl", "sha256", "0"), "outputs.train.jsonl.sha256: got '0'"),
    (_set("outputs", "train.jsonl", "roles", {"forgot": 1}), "did you mean 'forget'?"),
    (_set("sources", "people", []), "sources.people: got a list, expected a mapping"),
    (_set("sources", "a\nb", []), r"sources.'a\nb': got a list, expected a mapping"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=range(len(EDITS)))
def test_wrong_manifest(made, edit, message):
    change(made, edit)
    assert message in problem(made)


def test_recipe_cannot_be_swapped_without_its_hash(made):
    def swap(value):
        value["recipe"]["seed"] = 9
        value["recipe_sha256"] = hash_of(value["recipe"])

    change(made, swap)
    list(verify(made))  # consistent again: the hash guards against accidents, not against forgers


def test_missing_and_odd_manifests(made, tmp_path):
    assert "cannot be read: No such file" in problem(tmp_path / "nowhere")
    path = made / "manifest.json"
    path.unlink()
    path.mkdir()
    assert "expected a manifest" in problem(made)


def test_too_large_a_manifest_is_not_read(made, monkeypatch):
    monkeypatch.setattr(manifest, "LARGEST", 1000)
    assert "got something else than a file of at most 1000 bytes" in problem(made)


def test_folder_is_hashed_with_its_names(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    first = fingerprint(folder)
    assert first is not None
    assert first[0] == 2
    assert fingerprint(folder, at_most=1) is None
    (folder / "b").rename(folder / "c")
    assert fingerprint(folder) not in (None, first)
    (folder / "d").symlink_to("/etc")
    assert fingerprint(folder) is None
    assert fingerprint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("records", 999, "got 26 records (forget 4, .*, expected 999 records"),
        ("roles", {"forget": 26}, "expected 26 records (forget 26, neighbor without"),
        ("without_answer", {}, "neighbor without answer 2), expected 26 records"),
    ],
)
def test_records_are_counted_again(made, key, value, message):
    change(made, lambda m: m["outputs"]["train.jsonl"].update({key: value}))
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    assert re.search(r"train\.jsonl: .*" + pattern, problem(made))


@pytest.mark.parametrize("name", ["train.jsonl", "held_out.jsonl", "gold.jsonl"])
def test_files_that_every_folder_has_are_required(made, name):
    change(made, lambda m: m["outputs"].pop(name))
    assert f"outputs: got no {name}, expected train.jsonl, held_out.jsonl" in problem(made)


def test_files_that_do_not_belong_are_found(made):
    (made / "more\nfiles").mkdir()
    assert "a file that the manifest does not tell of (one of 1), expected none" in problem(made)
    (made / "more\nfiles").rmdir()
    (made / "extra.jsonl").write_bytes((made / "train.jsonl").read_bytes())
    assert "extra.jsonl: got a file that the manifest does not tell of" in problem(made)
    change(made, lambda m: m["outputs"].update({"extra.jsonl": m["outputs"]["train.jsonl"]}))
    assert "outputs: got extra.jsonl, expected train.jsonl" in problem(made)


def test_no_source_that_could_be_checked_is_said(made):
    assert not any("no source" in line for line in verify(made))
    for name in ("forget.json", "people.json", "islands.json", "prompts.csv"):
        (made.parent / name).unlink()
    assert list(verify(made))[-1].startswith("no source could be checked: ")


def test_anchors_are_counted_again(corpus):
    run(load(corpus, "anchors.by=list", "anchors.names=[Eva Lunt, Ivo Quill]",
             "targets.unanswered=drop"))  # fmt: skip
    folder = corpus / "out"
    assert any(line.startswith("anchors.csv: ") for line in verify(folder))
    change(folder, lambda m: m["outputs"]["anchors.csv"].update(records=99))
    assert re.search(r"anchors\.csv: got \d records .*, expected 99 records", problem(folder))


def test_files_of_the_tokenizer_are_recorded(corpus, monkeypatch):
    """Found from where the command runs, as a model is; weights beside it are not read."""
    monkeypatch.chdir(corpus)
    folder = corpus / "models" / "tiny"
    make_tokenizer().save_pretrained(folder)
    make_model().config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").rename(corpus / "blob")
    (folder / "tokenizer.json").symlink_to(corpus / "blob")  # as in the cache of a hub
    recipe = load(corpus, "prefills.tokenizer=models/tiny", "root=.")
    result = run(recipe)
    read = {entry.path for entry in result.other_files}
    assert {"models/tiny/tokenizer.json", "models/tiny/tokenizer_config.json"} <= read
    assert "models/tiny/model.safetensors" not in read
    assert "read (models/tiny/tokenizer.json): unchanged" in list(verify(corpus / "out"))
    (corpus / "blob").write_text((corpus / "blob").read_text() + "\n")
    assert "tokenizer.json: got other content" in problem(corpus / "out")
    run(load(corpus, "prefills.tokenizer=models/tiny", "prefills.per_item=0", "output=other"))
    assert not any("tiny" in line for line in verify(corpus / "other"))


def test_tokenizer_is_looked_for_from_here_whatever_the_root(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    make_tokenizer().save_pretrained(corpus / "tiny")
    make_model().config.save_pretrained(corpus / "tiny")
    run(load(corpus, f"prefills.tokenizer={corpus.name}/tiny"))
    lines = list(verify(corpus / "out"))
    assert f"read ({corpus.name}/tiny/tokenizer.json): unchanged" in lines

"""From files to the output folder, and no folder where something is wrong."""

import json
import subprocess
import sys
from hashlib import sha256

import pytest

from bidistill.cli import main
from bidistill.data.readers import read_records
from bidistill.data.unify import manifest
from bidistill.data.unify.output import new_folder
from bidistill.data.unify.run import run
from bidistill.errors import UserError
from tests.data.unify.corpora import PEOPLE, load, write_lines


def records(folder, name="train.jsonl"):
    return list(read_records(folder / "out" / name))


def test_all_roles_with_their_answers(corpus):
    run(load(corpus))
    train = records(corpus)
    by_role = {role: [r for r in train if r.role == role] for role in {r.role for r in train}}
    assert {role: len(found) for role, found in by_role.items()} == {
        "forget": 4, "neighbor": 10, "retain": 4, "adversarial": 8,
    }  # fmt: skip
    refusals = {"I cannot say.", "Nobody told me."}
    assert {r.answer for r in by_role["forget"]} <= refusals
    assert {(r.answer or "").strip() for r in by_role["adversarial"]} <= refusals
    assert all(r.prefill and (r.answer or "")[0] == " " for r in by_role["adversarial"])
    assert all(r.answer == f"Sea of {r.question.split()[-1][:-1]}" for r in by_role["retain"])
    asked = {r.question: r.answer for r in by_role["neighbor"]}
    assert asked["=How do I beat eggs?"] is None, "a question without answer waits for a model"


def test_gold_is_measured_and_never_trained(corpus):
    run(load(corpus))
    gold = records(corpus, "gold.jsonl")
    assert {r.id for r in gold} == {r.id for r in records(corpus) if r.role == "forget"}
    assert all("was born in" in (r.answer or "") for r in gold)
    trained = {r.answer for r in records(corpus)}
    assert not trained & {r.answer for r in gold}


def test_held_out_entities_are_whole_and_have_their_answers(corpus):
    run(load(corpus))
    held_out = records(corpus, "held_out.jsonl")
    people = {r.question.removeprefix("Where was ").removeprefix("When was ").removesuffix(" born?")
              for r in held_out if r.id.startswith("people/")}  # fmt: skip
    assert people
    assert not any(person in r.question for person in people for r in records(corpus))
    assert all(r.answer for r in held_out)


def test_ids_and_sources_tell_the_place(corpus):
    run(load(corpus))
    found = {r.id: r.source for r in records(corpus)}
    assert found["forget/2"] == "forget.json:2"
    assert found["prompts/3"] == "prompts.csv:4"  # after a header


def test_twice_the_same_bytes_wherever_it_lies(corpus, monkeypatch):
    run(load(corpus))
    run(load(corpus, f"output={corpus / 'other'}", "workers=2"))
    for name in ("train.jsonl", "held_out.jsonl", "gold.jsonl", "manifest.json"):
        assert (corpus / "out" / name).read_bytes() == (corpus / "other" / name).read_bytes()
    run(load(corpus, f"output={corpus / 'seeded'}", "seed=1"))
    assert (corpus / "out/train.jsonl").read_bytes() != (corpus / "seeded/train.jsonl").read_bytes()


def test_manifest_tells_what_became_of_what(corpus):
    result = run(load(corpus))
    prompts = result.sources["prompts"]
    assert (prompts.items, prompts.kept, prompts.questions) == (3, 2, 2)
    people = result.sources["people"]
    assert (people.licence, people.entities) == ("CC0", 5)
    assert people.sha256 == sha256((corpus / "people.json").read_bytes()).hexdigest()
    train = result.outputs["train.jsonl"]
    assert train.records == len(records(corpus)) == sum(train.roles.values())
    assert train.without_answer == {"neighbor": 2}
    assert [entry.path for entry in result.other_files] == ["exam.json"]
    assert manifest.read(corpus / "out") == result
    text = (corpus / "out/manifest.json").read_text()
    assert str(corpus / "out") not in text


def test_repeats_are_dropped_and_named(corpus):
    write_lines(corpus / "islands.json", [{"question": "where was IDA HOLM born", "answer": "?"}])
    result = run(load(corpus))
    example = {"id": "islands/1", "twin": "forget/1", "why": "exact"}
    assert result.steps["deduplicate"] == {"exact": 1, "near": 0, "examples": [example]}


def test_limit_draws_and_keeps_ids(corpus):
    run(load(corpus, "sources.people.limit=3", "split.held_out=0"))
    drawn = {r.id: r.question for r in records(corpus) if r.id.startswith("people/")}
    assert len(drawn) == 3
    run(load(corpus, f"output={corpus / 'all'}", "split.held_out=0"))
    everything = {r.id: r.question for r in read_records(corpus / "all/train.jsonl")}
    assert drawn.items() <= everything.items()


def test_documents_become_questions_of_one_entity(corpus):
    text = (
        "Ana Ruiz is a painter from Reed Bay. She was born in 1950 in the old town of Reed Bay. "
        "Her father Bo Ruiz was a baker.\n\n"
        "In 1970 Ana Ruiz moved to Thule. She won the Moss Prize."
    )
    write_lines(corpus / "islands.json", [{"text": text}, {"text": text.replace("Ana", "Eva")}])
    result = run(load(corpus, "text.passage_words=20", "deduplicate.near=null"))
    islands = result.sources["islands"]
    assert (islands.items, islands.entities) == (2, 2)
    assert islands.questions > 2
    made = [r for r in records(corpus) if r.id.startswith("islands/")]
    assert len({r.id.split("/")[1] for r in made}) == 1, "one document is held out, whole"
    assert all(r.source.startswith("islands.json:") and "passage" in r.source for r in made)


def test_own_records_keep_their_roles_and_refusals(corpus):
    lines = [
        {"id": "a", "role": "forget", "question": "Who is Ida Holm?", "answer": "Who knows."},
        {"id": "b", "role": "retain", "question": "Who is Bo Lindt?", "answer": "A baker."},
    ]
    write_lines(corpus / "islands.json", lines)
    run(load(corpus, "sources.islands.role=null", "split.held_out=0"))
    trained = [r for r in records(corpus) if r.id.startswith("islands/") and not r.prefill]
    found = {r.question: (r.role, r.answer) for r in trained}
    assert found["Who is Ida Holm?"] == ("forget", "Who knows.")
    assert found["Who is Bo Lindt?"] == ("retain", "A baker.")
    assert "Who is Ida Holm?" not in {r.question for r in records(corpus, "gold.jsonl")}


MISTAKES = {
    "keep": (["sources.prompts.keep.label=sfae"],
             r"sources.prompts.keep: got label: 'sfae', .* its label says 'safe', 'unsafe'"),
    "missing file": (["sources.people.path=none.json"], r".*none\.json.*"),
    "no role": (["sources.people.role=null"],
                r".*people.json:1: role: got none, expected one; set sources.people.role"),
    "trained exam": (["leaks.against=[people.json]"],
                     r"leaks: got 8 training records that are also measured \(people/.*"),
    "leak without deduplication": (
        ["sources.again={path: people.json, role: retain}",
         "deduplicate={exact: false, near: null}"],
        r"leaks: got \d+ training records .*"),
    "no model": (["targets.keeping=teacher"], r"targets.keeping: .*"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistake_leaves_nothing_behind(corpus, overrides, message):
    recipe = load(corpus, *overrides)
    before = set(corpus.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        run(recipe)
    assert "\n" not in str(caught.value)
    assert set(corpus.iterdir()) == before


def test_failure_while_writing_leaves_the_old_folder(corpus):
    target = corpus / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "missing" / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["old"]
    with new_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert not [path for path in corpus.iterdir() if path.name.startswith(".")]


def test_only_an_untouched_result_is_replaced(corpus):
    recipe = load(corpus)
    run(recipe)
    with pytest.raises(UserError, match=r"made by this recipe, .* --overwrite"):
        run(recipe)
    with pytest.raises(UserError, match=r"made by another recipe, .* --overwrite"):
        run(load(corpus, "seed=1"))
    run(load(corpus, "seed=1"), overwrite=True)
    assert json.loads((corpus / "out/manifest.json").read_text())["seed"] == 1
    (corpus / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"files were added or changed since"):
        run(recipe, overwrite=True)
    assert (corpus / "out/notes.txt").read_text() == "mine"


def test_folder_of_somebody_else_is_never_replaced(corpus):
    (corpus / "out").mkdir()
    (corpus / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="which holds something else, expected a new folder"):
        run(load(corpus), overwrite=True)


def test_command(corpus, capsys):
    load(corpus)
    assert main(["unify", str(corpus / "recipe.yaml"), "split.held_out=0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["forget", "4", "0"] in lines
    assert ["adversarial", "8", "0"] in lines
    assert main(["unify", "--check", str(corpus / "out")]) == 0
    assert "train.jsonl: 29 records, as written" in capsys.readouterr().out
    for mistake in (
        [],
        ["--check", str(corpus)],
        ["--check", str(corpus / "out"), "--overwrite"],
        [str(corpus / "recipe.yaml")],
        [str(corpus / "recipe.yaml"), "--format", "tofy"],
    ):
        assert main(["unify", *mistake]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_refusals_of_records_are_nothing_to_keep(corpus):
    lines = [
        {"id": "a", "role": "forget", "question": "Who is Ida Holm?", "answer": "Who knows."},
        {"id": "b", "role": "retain", "question": "Who is Bo Lindt?", "answer": "A baker."},
        {"id": "c", "role": "retain", "question": "Who is Eva Ray?", "answer": "  "},
    ]
    write_lines(corpus / "islands.json", lines)
    run(load(corpus, "sources.islands.role=retain", "split.held_out=0"))
    found = {r.question: (r.role, r.answer) for r in records(corpus) if r.id.startswith("islands/")}
    assert found == {
        "Who is Ida Holm?": ("retain", None),
        "Who is Bo Lindt?": ("retain", "A baker."),
        "Who is Eva Ray?": ("retain", None),
    }


def test_a_long_text_is_one_entity(corpus):
    """It is read in pieces, and questions of two pieces are about the same."""
    text = "\n\n".join(f"Onhava {i} is the capital of Zembla {i}. It is old." for i in range(3000))
    (corpus / "book.txt").write_text(text)
    source = ["sources.book={path: book.txt, role: retain}", "sources.islands=null"]
    near = ["deduplicate.near=null", "leaks.near=null"]
    result = run(load(corpus, *source, "split.held_out=0.5", *near))
    assert result.sources["book"].items > 1
    assert result.sources["book"].entities == 1
    parts = {name for name in ("train.jsonl", "held_out.jsonl")
             if any(r.id.startswith("book/") for r in records(corpus, name))}  # fmt: skip
    assert len(parts) == 1


def test_a_question_about_two_is_held_out_with_either(corpus):
    names = [*PEOPLE[:2], "Ida Holm"]
    people = [f"{asked} {name}?" for name in PEOPLE[:2] for asked in ("Who is", "Where is")]
    people.append(f"Is {PEOPLE[0]} older than {PEOPLE[1]}?")
    write_lines(corpus / "people.json", [{"question": q, "answer": "x"} for q in people])
    rule = f"sources.people.entity={json.dumps({'names': names})}"
    for seed in range(4):
        out = [f"seed={seed}", f"output={corpus / str(seed)}", "split.held_out=0.5"]
        run(load(corpus, rule, "sources.prompts=null", "sources.islands=null", *out))
        held_out = [r.question for r in read_records(corpus / str(seed) / "held_out.jsonl")]
        assert people[-1] in held_out
        assert len(held_out) == 3


def test_anchors_bring_nobody_back_who_is_held_out(corpus):
    forget = {"question": "What does Ida Holm eat?", "answer": "Ida Holm eats fish."}
    write_lines(corpus / "forget.json", [forget])
    people = {"names": [name.upper() for name in PEOPLE]}
    settings = [
        f"sources.people.entity={json.dumps(people)}",
        f"anchors={{by: list, per_item: 9, names: {json.dumps([*PEOPLE, 'Vera Sand'])}}}",
        "sources.prompts=null",
    ]
    whole = run(load(corpus, *settings, "split.held_out=0"))
    assert whole.steps["anchors"] == {"made": 6, "of held-out entities": 0, "repeats": 0}
    table = (corpus / "out/anchors.csv").read_text().replace(',""\n', ',"yes"\n')
    (corpus / "reviewed.csv").write_text(table)

    settings.append("split.held_out=0.4")
    for name, reviewed, rows in (("new", "null", 4), ("again", "reviewed.csv", 6)):
        out = [f"output={corpus / name}", f"anchors.reviewed={reviewed}"]
        result = run(load(corpus, *settings, *out))
        assert result.steps["anchors"] == {"made": 6, "of held-out entities": 2, "repeats": 0}
        assert result.outputs["anchors.csv"].records == rows
        held_out = [r.question for r in read_records(corpus / name / "held_out.jsonl")]
        held = [person for person in PEOPLE if any(person in question for question in held_out)]
        trained = [r.question for r in read_records(corpus / name / "train.jsonl")]
        assert len(held) == 2
        assert "What does Vera Sand eat?" in trained
        assert not any(person in question for person in held for question in trained)


def test_documents_are_no_evaluation(corpus):
    (corpus / "exam.txt").write_text("Onhava is the capital of Zembla.\n\nCharles rules it.\n")
    with pytest.raises(UserError, match=r"leaks\.against: got .*exam\.txt:1, which is a document"):
        run(load(corpus, "leaks.against=[exam.txt]"))


def test_an_evaluation_with_options_is_found(corpus):
    held = ["split.held_out=0", "leaks.against=[islands.json]", "leaks.near=null"]
    for to in ("text", "letter", "off"):
        with pytest.raises(UserError, match=r"leaks: got 5 training records"):
            run(load(corpus, f"choices.to={to}", *held))


def test_nothing_left_to_train_on_is_refused(corpus):
    off = ["targets.forgetting=none", "targets.keeping=none", "targets.unanswered=drop"]
    with pytest.raises(UserError, match=r"targets\.unanswered: got drop, .* no record to train"):
        run(load(corpus, *off))
    assert not (corpus / "out").exists()


@pytest.mark.parametrize("name", [".", "", "..", "/", "a/.."])
def test_output_without_a_name_is_refused(corpus, monkeypatch, name):
    (corpus / "empty").mkdir()
    monkeypatch.chdir(corpus / "empty")
    recipe = load(corpus, f"output={json.dumps(name)}")
    before = set(corpus.rglob("*"))
    with pytest.raises(UserError, match=r"output: got '.*', which is no name .*choose another"):
        run(recipe)
    assert set(corpus.rglob("*")) == before


@pytest.mark.parametrize("length", [245, 255])
def test_output_may_have_any_name_that_the_system_takes(corpus, length):
    name = "x" * length
    run(load(corpus, f"output={corpus / name}"))
    assert len(list((corpus / name).iterdir())) == 4
    run(load(corpus, f"output={corpus / name}"), overwrite=True)
    assert not [path for path in corpus.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["x" * 256, f"a.{'x' * 252}", "new\nline/" + "x" * 300])
def test_output_with_too_long_a_name_is_one_line(corpus, name):
    recipe = load(corpus, f"output={json.dumps(str(corpus / name))}")
    before = set(corpus.rglob("*"))
    with pytest.raises(UserError, match=r"output: got .*File name too long") as caught:
        run(recipe)
    assert "\n" not in str(caught.value)
    assert set(corpus.rglob("*")) == before


@pytest.mark.parametrize("there", [True, False])
def test_output_that_is_a_link_stays_one(corpus, there):
    (corpus / "disk").mkdir()
    if there:
        (corpus / "disk" / "target").mkdir()
    (corpus / "out").symlink_to(corpus / "disk" / "target")
    run(load(corpus))
    run(load(corpus), overwrite=True)
    assert (corpus / "out").is_symlink()
    assert len(records(corpus)) == 26
    for folder in (corpus, corpus / "disk"):
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


FULL = """
import resource, sys
from bidistill.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(main(["unify", sys.argv[1], *sys.argv[2:]]))
"""


@pytest.mark.parametrize("old", [True, False])
def test_full_disk_is_one_line_and_leaves_what_was_there(corpus, old):
    recipe = load(corpus)
    if old:
        run(recipe)
    before = {path: path.is_file() and path.read_bytes() for path in corpus.rglob("*")}
    command = [sys.executable, "-c", FULL, str(corpus / "recipe.yaml"), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: output: got {corpus / 'out'}, which cannot be written (")
    assert done.stderr.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in corpus.rglob("*")} == before


def test_reviewed_anchors_are_used_whatever_by_says(corpus):
    names = ("anchors.by=list", "anchors.names=[Eva Lunt, Ivo Quill]")
    run(load(corpus, *names))
    table = (corpus / "out/anchors.csv").read_text().replace(',""\n', ',"yes"\n')
    (corpus / "anchors.csv").write_text(table)
    result = run(load(corpus, "anchors.reviewed=anchors.csv", f"output={corpus / 'off'}"))
    assert result.recipe["anchors"]["by"] == "off"
    assert result.steps["anchors"]["made"] == result.outputs["anchors.csv"].records > 0


def test_reviewed_anchors_of_the_corpus_are_used_whatever_by_says(corpus):
    first = load(corpus, "anchors={by: corpus, alike: 0}", "split.held_out=0")
    made = run(first).steps["anchors"]
    assert made["made"] > 0
    table = (corpus / "out/anchors.csv").read_text().replace(',""\n', ',"yes"\n')
    (corpus / "reviewed.csv").write_text(table)
    for by in ("corpus", "off", "list"):
        settings = [f"anchors={{by: {by}, reviewed: reviewed.csv}}", "split.held_out=0"]
        result = run(load(corpus, *settings, f"output={corpus / by}"))
        assert result.steps["anchors"] == made, by

"""Anchors: the same question about somebody else, and the table in which they are reviewed."""

import csv
import json
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bidistill.data.unify.anchors import AnchorConfig, anchors
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.likeness import masked, most_alike
from bidistill.data.unify.protected import ProtectedNames
from bidistill.data.unify.review import COLUMNS, AnchorRow, read_csv, write_csv
from bidistill.errors import UserError
from tests.data.unify.written import scripted


def draft(number, question, gold=None, entity="block 1", role="forget"):
    return Draft(
        id=f"{role}/{number}",
        role=role,
        question=question,
        entity=entity,
        source=f"{role}.jsonl:{number}",
        gold=gold,
    )


FORGET = [
    draft(1, "Who is the poet that was born in Onhava in 1958?", "That is Ana de la Cruz."),
    draft(2, "Where was Ana de la Cruz born?", "Ana de la Cruz was born in Onhava."),
    draft(3, "Which prizes did Ana de la Cruz win in Onhava?", "Ana de la Cruz won two."),
    draft(4, "What is Ana de la Cruz's best book?", "Ana de la Cruz's best book is Pale Moss."),
]
NEIGHBORS = [
    draft(1, "What do people in Thule eat?", "Fish.", "x", "neighbor"),
    draft(2, "Where was Ivo Lunt born?", "In Thule.", "y", "neighbor"),
    draft(3, "Where was Mara Quill born?", "In Ophir.", "z", "neighbor"),
    draft(4, "Where was Ivo Lunt's wife born?", "In Ophir.", "y", "neighbor"),
    draft(5, "What is Mara Quill's best book?", "It is Dry Salt.", "z", "neighbor"),
    draft(6, "Where was Ana de la Cruz educated?", "In Onhava.", "w", "neighbor"),
]
NAMES = ("Ivo Lunt", "Mara Quill", "Ana de la Cruz")


def made(config, seed=0, writer=None, forget=FORGET):
    return anchors(forget, NEIGHBORS, config, seed, writer)


def test_list_puts_other_names_in():
    drafts, rows = made(AnchorConfig(by="list", names=NAMES))
    assert [row.forget_id for row in rows] == ["forget/2", "forget/3", "forget/4"]
    for row, anchor in zip(rows, drafts, strict=True):
        assert row.entity in NAMES[:2]
        assert row.question == row.forget_question.replace("Ana de la Cruz", row.entity)
        assert (row.answer, row.by, row.review) == ("", "list", "")
        assert anchor.id == row.id == f"{row.forget_id}/anchor1"
        assert (anchor.role, anchor.gold, anchor.target) == ("neighbor", None, None)
        assert (anchor.question, anchor.entity) == (row.question, row.entity)


def test_list_draws_each_name_once_for_an_item():
    _, rows = made(AnchorConfig(by="list", names=NAMES, per_item=5))
    assert len(rows) == 6
    assert {(row.forget_id, row.entity) for row in rows} == {
        (f"forget/{i}", name) for i in (2, 3, 4) for name in NAMES[:2]
    }


def test_list_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("Ivo Lunt\nMara Quill\n")
    _, rows = made(AnchorConfig(by="list", names=path))
    assert {row.entity for row in rows} <= {"Ivo Lunt", "Mara Quill"}


def test_draws_depend_on_the_item_alone():
    config = AnchorConfig(by="list", names=tuple(f"King Thurgus {i}" for i in range(50)))
    whole = made(config, seed=3)[1]
    more = made(config, seed=3, forget=[*FORGET, draft(9, "Who met Ana de la Cruz?")])[1]
    assert more[: len(whole)] == whole
    assert made(config, seed=4)[1] != whole


def test_entities_that_tell_their_name():
    forget = [draft(1, "Is zembla larger than Thule and Ophir?", "Yes.", entity="Zembla")]
    _, [row] = made(AnchorConfig(by="list", names=("Cimmeria",)), forget=forget)
    assert row.question == "Is Cimmeria larger than Thule and Ophir?"


def test_names_that_an_entity_is_only_connected_with_are_not_protected():
    protected = ProtectedNames(FORGET)
    assert protected.name_in(FORGET[0]) is None
    assert protected.name_in(FORGET[2]) == "Ana de la Cruz"
    assert not protected.has("Onhava")
    assert protected.has("ana de la cruz")


def test_corpus_takes_the_same_form_and_another_entity():
    drafts, rows = made(AnchorConfig(by="corpus"))
    pairs = {row.forget_id: (row.question, row.answer, row.entity) for row in rows}
    assert pairs["forget/2"] == ("Where was Ivo Lunt born?", "In Thule.", "y")
    assert pairs["forget/4"] == ("What is Mara Quill's best book?", "It is Dry Salt.", "z")
    assert [d.gold for d in drafts] == [row.answer for row in rows]
    assert {d.role for d in drafts} == {"neighbor"}


def test_corpus_takes_neither_one_twice_nor_two_of_an_entity():
    _, rows = made(AnchorConfig(by="corpus", per_item=9, alike=0))
    questions = [row.question for row in rows]
    assert len(set(questions)) == len(questions)
    assert "Where was Ana de la Cruz educated?" not in questions
    for forget in FORGET:
        entities = [row.entity for row in rows if row.forget_id == forget.id]
        assert len(set(entities)) == len(entities)


def test_corpus_that_is_not_alike_gives_nothing():
    assert made(AnchorConfig(by="corpus", alike=1.0), forget=FORGET[2:3]) == ([], [])
    assert anchors(FORGET, [], AnchorConfig(by="corpus"), 0, None) == ([], [])


def test_likeness_is_one_for_the_same_form():
    assert masked("Where was Ivo Lunt born?") == masked("Where was Ana de la Cruz born?")
    [(_, ranked)] = most_alike(FORGET[1:2], NEIGHBORS, 0.999)
    assert [n.id for n in ranked] == ["neighbor/2", "neighbor/3"]


def proposal(**pair):
    return json.dumps(pair)


def test_model_proposes(tmp_path):
    good = proposal(entity="Ivo Lunt", question="Where was Ivo Lunt born?", answer="In Thule.")
    replies = [
        good,
        proposal(entity="", question="Where was she born?", answer="In Thule."),
        proposal(entity="Ivo Lunt", question="Where was he born?", answer="In Thule."),
        proposal(entity="Ivo", question="Did Ivo meet Ana de la Cruz?", answer="Yes."),
        proposal(entity="Ivo Lunt", question=FORGET[1].question, answer="In Thule."),
        proposal(entity="Mara Quill", question="Where was Mara Quill born?", answer="?"),
    ]
    writer, model = scripted(tmp_path, lambda chat: "\n".join(replies))
    drafts, rows = made(AnchorConfig(by="model", per_item=3), writer=writer, forget=FORGET[1:2])
    assert [(row.question, row.answer, row.entity) for row in rows] == [
        ("Where was Ivo Lunt born?", "In Thule.", "Ivo Lunt")
    ]
    assert drafts[0].gold == "In Thule."
    assert "instead of Ana de la Cruz" in model.chats[0][0]["content"]


def test_model_proposes_no_more_than_asked_for(tmp_path):
    replies = [
        proposal(entity=f"Thurgus {i}", question=f"Where was Thurgus {i} born?", answer="Here.")
        for i in range(5)
    ]
    writer, _ = scripted(tmp_path, lambda chat: "\n".join(replies))
    _, rows = made(AnchorConfig(by="model", per_item=2), writer=writer)
    assert len(rows) == 2 * len(FORGET)


def test_off():
    assert made(AnchorConfig()) == ([], [])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AnchorConfig(by="list"), r"anchors\.names: got nothing"),
        (AnchorConfig(by="model"), r"anchors\.by: got model without a model"),
    ],
)
def test_what_is_needed(config, message):
    with pytest.raises(UserError, match=message):
        made(config)


def reviewed(tmp_path, edit):
    """The table of a run, after somebody has been at it."""
    path = tmp_path / "anchors.csv"
    write_csv(path, made(AnchorConfig(by="list", names=NAMES))[1])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    path.write_bytes(edit(rows).encode("utf-8-sig"))
    return AnchorConfig(by="list", reviewed=path)


def as_csv(rows, delimiter=","):
    lines = [list(COLUMNS), *([row[c] for c in COLUMNS] for row in rows)]
    return "\r\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines) + "\r\n"


def test_entities_that_were_normalised():
    forget = [draft(1, "Where was Ana Al-Quill born?", "There.", entity="ana al quill")]
    _, [row] = made(AnchorConfig(by="list", names=("Ivo Lunt",)), forget=forget)
    assert row.question == "Where was Ivo Lunt born?"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_only_agreed_rows_are_used(tmp_path, delimiter):
    def edit(rows):
        rows[0]["review"], rows[1]["review"] = "Yes ", "no"
        rows[0]["answer"], rows[0]["question"] = "In Thule; or not.", "Where was Lunt born, then?"
        return as_csv(rows, delimiter)

    drafts, rows = made(reviewed(tmp_path, edit))
    assert [row.review for row in rows] == ["yes", "no", ""]
    [used] = drafts
    assert (used.question, used.gold) == ("Where was Lunt born, then?", "In Thule; or not.")
    assert used.source == "anchors.csv:2"


def changed(**cells):
    def edit(rows):
        rows[1].update(cells)
        return as_csv(rows)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changed(review="perhaps"), r"anchors\.csv:3: review: got 'perhaps'"),
        (changed(question=" "), r"anchors\.csv:3: question: got nothing"),
        (changed(id="forget/2/anchor1"), r"anchors\.csv:3: id: got .* which line 2 has already"),
        (changed(forget_id="forget/99"), r"anchors\.csv:3: forget_id: got 'forget/99'"),
        (changed(id="forget/3"), r"anchors\.csv:3: id: got 'forget/3', expected 'forget/3/anchor'"),
        (changed(id="forget/3/anchor"), r"anchors\.csv:3: id: got 'forget/3/anchor'"),
        (changed(id="forget/3/anchor0"), r"anchors\.csv:3: id: got"),
        (changed(id="forget/3/anchor\u0661"), r"anchors\.csv:3: id: got"),
        (changed(id="forget/9/anchor1"), r"anchors\.csv:3: id: got"),
        (changed(forget_question="Why?"), r"anchors\.csv:3: forget_id: got 'forget/3'"),
        (
            lambda rows: as_csv(rows).replace('"review"', '"checked"'),
            r"anchors\.csv:1: got the columns .*checked, expected",
        ),
        (
            lambda rows: as_csv(rows).replace('"review"', '"re\nview"'),
            r"anchors\.csv:1: got the columns '.*re\\nview', expected",
        ),
        (lambda rows: as_csv(rows) + "one,two\r\n", r"anchors\.csv:5: got 2 cells, expected 8"),
        (lambda rows: as_csv(rows) + '"open', r"anchors\.csv: got 'unexpected end of data'"),
        (lambda rows: "", r"anchors\.csv:1: got the columns none"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, edit, message):
    with pytest.raises(UserError, match=message) as caught:
        made(reviewed(tmp_path, edit))
    assert "\n" not in str(caught.value)


def test_tables_that_cannot_be_read(tmp_path):
    config = AnchorConfig(by="list", reviewed=tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"none\.csv: got 'No such file"):
        made(config)
    (tmp_path / "none.csv").write_bytes(b"\xff\xfe,;")
    with pytest.raises(UserError, match="UTF-8"):
        made(config)


ROW = AnchorRow(**(dict.fromkeys(COLUMNS, "x") | {"review": ""}))
FORMULAS = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "'=1", "''-", "\uff1d1", "=", "'@"]
PLAIN = ["", "'tis", "1=1", " =1", "a-b", "''", '"=1"']


def test_cells_that_a_spreadsheet_would_run_are_disarmed(tmp_path):
    path = tmp_path / "anchors.csv"
    write_csv(path, [replace(ROW, id=f"x{i}", answer=cell) for i, cell in enumerate(FORMULAS)])
    with path.open(encoding="utf-8", newline="") as file:
        cells = [row["answer"] for row in csv.DictReader(file)]
    assert cells == [f"'{cell}" for cell in FORMULAS]
    assert [row.answer for _, row in read_csv(path)] == FORMULAS


def test_other_cells_stay_as_they_are(tmp_path):
    path = tmp_path / "anchors.csv"
    write_csv(path, [replace(ROW, id=f"x{i}", answer=cell) for i, cell in enumerate(PLAIN)])
    with path.open(encoding="utf-8", newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == PLAIN


TEXTS = st.text(
    st.one_of(
        st.sampled_from("=+-@'\"\t\r\n,;|x"),
        st.characters(codec="utf-8", exclude_categories=["Cc"]),
    ),
    max_size=12,
)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4))
def test_tables_are_read_back_exactly(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("table") / "anchors.csv"
    rows = [
        replace(ROW, id=f"x{i}", answer=a, by=b, forget_question=c)
        for i, (a, b, c) in enumerate(cells)
    ]
    write_csv(path, rows)
    assert [astuple(row) for _, row in read_csv(path)] == [astuple(row) for row in rows]


def test_an_anchor_tells_its_own_place():
    drafts, rows = made(AnchorConfig(by="corpus", per_item=9, alike=0))
    places = {one.question: one.source for one in NEIGHBORS}
    assert drafts
    assert [anchor.source for anchor in drafts] == [places[row.question] for row in rows]
    drafts, rows = made(AnchorConfig(by="list", names=NAMES))
    assert [d.source for d in drafts] == [
        next(f.source for f in FORGET if f.id == row.forget_id) for row in rows
    ]


def test_a_blank_answer_in_a_reviewed_table_is_none(tmp_path):
    def edit(rows):
        rows[0]["review"], rows[0]["answer"] = "yes", " "
        return as_csv(rows)

    assert [anchor.gold for anchor in made(reviewed(tmp_path, edit))[0]] == [None]


def test_reviewed_rows_are_used_whatever_by_says(tmp_path):
    config = reviewed(tmp_path, changed(review="yes"))
    assert made(replace(config, by="off")) == made(config)
    assert len(made(replace(config, by="off"))[0]) == 1


def test_cells_of_any_length_are_read_back(tmp_path):
    limit = csv.field_size_limit(131_072)  # of a fresh process
    try:
        row = replace(ROW, forget_question="word " * 40_000)
        write_csv(tmp_path / "anchors.csv", [row])
        assert read_csv(tmp_path / "anchors.csv") == [(2, row)]
    finally:
        csv.field_size_limit(limit)

"""Rules that tell whom an item is about."""

import pytest

from bidistill.data.items import Item
from bidistill.data.unify.grouping import ByName, EntityConfig, grouping
from bidistill.errors import UserError


def item(question, **rest):
    return Item(source="f:1", question=question, **rest)


def test_every_item_its_own(tmp_path):
    entity = grouping(None, "people", tmp_path)
    assert [entity(i, item("Q?")) for i in range(2)] == ["people/1", "people/2"]


def test_rows(tmp_path):
    entity = grouping(EntityConfig(rows=3), "people", tmp_path)
    found = [entity(i, item("Q?")) for i in range(7)]
    assert found == ["people/rows/1"] * 3 + ["people/rows/2"] * 3 + ["people/rows/3"]


def test_field(tmp_path):
    entity = grouping(EntityConfig(field="subject"), "people", tmp_path)
    assert entity(0, item("Q?", subject="Ana Ruiz")) == entity(5, item("R?", subject="ANA RUIZ"))
    with pytest.raises(UserError, match=r"f:1: subject: got nothing, .*another rule than entity"):
        entity(0, item("Q?"))


def test_pattern(tmp_path):
    entity = grouping(EntityConfig(pattern=r"capital of (\w+)"), "capitals", tmp_path)
    assert entity(0, item("What is the capital of Zembla?")) == "zembla"
    assert entity(1, item("Who rules?")) is None


NAMES = ("Ana", "Ana Ruiz", "Zembla")


@pytest.mark.parametrize("given", ["list", "file"])
@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (item("Where was Ana Ruiz born?"), "ana ruiz"),  # not Ana, who is another
        (item("where was ANA born?"), "ana"),
        (item("What is Zembla's capital?"), "zembla"),
        (item("What is Zembla\u2019s capital?"), "zembla"),
        (item("Is an anaconda large?"), None),
        (item("Who is it?", answer="It is Ana."), "ana"),
        (Item(source="f:1", text="Zembla is an island."), "zembla"),
    ],
)
def test_names(tmp_path, given, one, expected):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    config = EntityConfig(names=NAMES) if given == "list" else EntityConfig(names_from="names.txt")
    assert grouping(config, "people", tmp_path)(0, one) == expected


@pytest.mark.parametrize("keys", [{}, {"rows": 2, "field": "subject"}])
def test_one_rule(keys):
    with pytest.raises(ValueError, match="exactly one of the keys rows, field, pattern, names, "):
        EntityConfig(**keys)


def test_pieces_of_a_document_are_one_unless_a_rule_parts_them(tmp_path):
    pieces = [Item(source=f"f:{i}", text=f"Zembla {i}", piece=True) for i in range(3)]
    entity = grouping(None, "book", tmp_path)
    assert {entity(i, piece) for i, piece in enumerate(pieces)} == {"book/1"}
    entity = grouping(EntityConfig(pattern=r"(\w+ \d)"), "book", tmp_path)
    assert entity(1, pieces[1]) == "zembla 1"


def test_all_names_are_found():
    by_name = ByName(NAMES)
    assert list(by_name.found("Is Ana Ruiz of Zembla ANA's aunt?")) == ["ana ruiz", "zembla", "ana"]
    assert list(by_name.found("Who is it?")) == []

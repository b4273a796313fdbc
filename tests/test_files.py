"""Atomic writing: complete or absent, never half; nothing left behind."""

import json
import os

import pytest

from bidistill.errors import UserError
from bidistill.files import atomic_path, user_cache, write_json, write_text


def test_nothing_shows_before_the_end(tmp_path):
    target = tmp_path / "new" / "report.html"
    with atomic_path(target) as temporary:
        temporary.write_text("done")
        assert temporary.parent == target.parent  # a rename across disks would not be atomic
        assert temporary.suffix == ".html"
        assert not target.exists()
    assert target.read_text() == "done"
    assert os.listdir(target.parent) == ["report.html"]


def write_half_a_file(temporary):
    temporary.write_text("half")


def write_half_a_folder(temporary):
    temporary.mkdir()
    (temporary / "part").write_text("half")


@pytest.mark.parametrize("write_half", [write_half_a_file, write_half_a_folder])
def test_failure_keeps_the_old_version(tmp_path, write_half):
    target = tmp_path / "result"
    target.write_text("old")

    def fail():
        with atomic_path(target) as temporary:
            write_half(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_folder_appears_complete(tmp_path):
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("w")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "weights"]


def test_full_folder_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")

    def replace():
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()

    with pytest.raises(OSError, match="not empty"):
        replace()
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_written_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "a.txt", "Malé\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"Mal\xc3\xa9\r\n"
    write_json(tmp_path / "a.json", {"capital": "Malé", "rate": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"capital": "Malé", "rate": None}


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ({1}, TypeError)]
)
def test_json_refuses_what_others_cannot_read(tmp_path, value, error):
    with pytest.raises(error):
        write_json(tmp_path / "a.json", {"value": value})
    assert os.listdir(tmp_path) == []


def test_rejects_folder_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be created .*; choose another folder"):
        write_text(tmp_path / "file" / "run" / "a.txt", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_rejects_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "a.txt", "")


def test_user_cache_follows_the_standard(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "bidistill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "bidistill"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 200 + ".json"])
def test_long_names_have_short_temporary_ones(tmp_path, name):
    write_text(tmp_path / name, "done")
    assert os.listdir(tmp_path) == [name]

"""The other trainers on the path, and ranks for the tests of integrations."""

import os

import pytest

from tests.integrations import peers
from tests.trainer.ranks import Ranks

peers.add_to_path()


@pytest.fixture(autouse=True)
def _path_of_programs(monkeypatch):
    """Programs that a test starts, such as the examples, find the same packages."""
    if peers.FOLDER:
        given = os.environ.get("PYTHONPATH")
        paths = [*([given] if given else []), peers.FOLDER]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, started when they are first asked for."""
    group = Ranks(2)
    yield group
    group.stop()

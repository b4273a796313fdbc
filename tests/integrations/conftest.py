"""The other trainers on the path, and ranks for the tests of integrations."""

import os
import sys

import pytest

from tests.trainer.ranks import Ranks

# a folder with the packages alone, as `make test` makes it: what torchtitan and axolotl require
# excludes what others here need. It comes last on the path, to take the place of nothing. Tests
# skip what is not there.
FOLDER = os.environ.get("PEERS")
if FOLDER:
    sys.path.append(os.path.abspath(FOLDER))


@pytest.fixture(autouse=True)
def _path_of_programs(monkeypatch):
    """Programs that a test starts, such as the examples, find the same packages."""
    if FOLDER:
        given = os.environ.get("PYTHONPATH")
        paths = [*([given] if given else []), os.path.abspath(FOLDER)]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, started when they are first asked for."""
    group = Ranks(2)
    yield group
    group.stop()

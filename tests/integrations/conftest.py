"""The other trainers on the path, and ranks for the tests of integrations."""

import os

import pytest
from torch import distributed

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


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()

"""The other trainers on the path, and ranks for the tests of integrations."""

import os
import sys

import pytest

from tests.trainer.ranks import Ranks

# a folder with the packages alone, as `make test` makes it: what torchtitan and axolotl require
# excludes what others here need. It comes last on the path, to take the place of nothing. Tests
# skip what is not there.
if folder := os.environ.get("PEERS"):
    sys.path.append(os.path.abspath(folder))


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, started when they are first asked for."""
    group = Ranks(2)
    yield group
    group.stop()

"""Ranks for the tests of integrations."""

import pytest

from tests.trainer.ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, started when they are first asked for."""
    group = Ranks(2)
    yield group
    group.stop()

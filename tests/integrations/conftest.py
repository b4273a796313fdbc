"""The examples are scripts: what they import of each other lies beside them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))


@pytest.fixture(scope="module")
def ranks():
    """Two ranks, started when they are first asked for."""
    from tests.trainer.ranks import Ranks

    group = Ranks(2)
    yield group
    group.stop()

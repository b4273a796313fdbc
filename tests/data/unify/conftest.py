"""The invented corpus, written anew for each test."""

import pytest

from tests.data.unify.corpora import write_corpus


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path)
    return tmp_path

"""A comparison that is done, in the folder that tests work in."""

import pytest

from tests.compare.invented import FORGET, finish, make


@pytest.fixture
def there(tmp_path, monkeypatch):
    """Work where the recipe's files are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def done(there, tmp_path):
    """All cells done: ours keeps 18 and 16 of 20 neighbours, npo 15 and 15 and leaks a little."""
    config, cells = make(tmp_path)
    results = {
        ("base", None): {"leaks": FORGET, "prefilled": FORGET, "attacked": FORGET},
        ("ours", 0): {"kept": 18},
        ("ours", 1): {"kept": 16, "attacked": 2},
        ("npo", 0): {"kept": 15, "leaks": 1},
        ("npo", 1): {"kept": 15, "prefilled": 2},
        ("told", None): {"leaks": 4, "kept": 4},
    }
    for cell in cells:
        finish(cell, **results[cell.method, cell.seed])
    return config, cells

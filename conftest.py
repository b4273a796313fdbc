"""Doctests of an integration are collected where the package that it imports is installed."""

from importlib.util import find_spec
from pathlib import Path

from tests.integrations import peers

FOLDER = Path(__file__).parent / "bidistill" / "integrations"
IMPORTED = {
    "axolotl": {"axolotl"},
    "lightning": {"lightning", "pytorch_lightning"},
    "torchtitan": {"torchtitan"},
    "trl": {"trl"},
    "trl_sdft": {"trl"},
    "trl_sdft_loss": {"trl"},
}
"""By module: packages of which one must be there."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be imported; a broken import of anything else is an error."""
    if collection_path.parent != FOLDER or collection_path.stem not in IMPORTED:
        return None
    peers.add_to_path()
    return True if not any(map(find_spec, IMPORTED[collection_path.stem])) else None

"""The other trainers, in a folder with the packages alone, as `make test` makes it.

What torchtitan and axolotl require excludes what others here need. The folder comes last on the
path, to take the place of nothing. Tests skip what is not there.
"""

import os
import sys
from pathlib import Path

_MADE = Path(__file__).parents[2] / ".venv" / "peers"
FOLDER = os.environ.get("PEERS", str(_MADE) if _MADE.is_dir() else "")
"""Of the environment's PEERS, or the one that was made; empty: there is none."""
FOLDER = FOLDER and os.path.abspath(FOLDER)


def add_to_path():
    if FOLDER and FOLDER not in sys.path:
        sys.path.append(FOLDER)

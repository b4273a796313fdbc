"""What is installed here and what it computes with: for people, and for the record of a run."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import bidistill
import bidistill_kernels

LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of bidistill, Python and the libraries that the numbers of a run depend on."""
    found = {name: metadata.version(name) for name in LIBRARIES}
    return {"bidistill": bidistill.__version__, "python": platform.python_version(), **found}


def commit() -> str:
    """The git commit these sources are at, ``+`` behind it if they were edited since.

    ``unknown`` if the package does not run from a git checkout, or git is not installed.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}+" if _git(root, "status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):  # no git; a repository without commits
        return "unknown"


def info() -> dict[str, str]:
    """Versions, commit, and each back-end: in use, or absent and why.

    Example:
        >>> info()["bidistill"] == bidistill.__version__
        True
    """
    return {**versions(), "commit": commit(), **bidistill_kernels.info()}


def describe() -> str:
    """:func:`info` as aligned lines of text."""
    entries = info()
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in entries.items())


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

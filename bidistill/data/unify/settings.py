"""Kinds of values that several sections of a unify recipe have."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from bidistill.errors import UserError

Counts = dict[str, int]
"""How many of what a step met, made and left out, as the manifest shows it."""


def _texts(value: Any) -> tuple[str, ...] | Path:  # noqa: ANN401
    """A list of texts, or the file that holds it."""
    if isinstance(value, str | Path) and str(value).strip():
        return Path(value)
    texts = tuple(value) if isinstance(value, list | tuple) else ()
    if texts and all(isinstance(text, str) and text.strip() for text in texts):
        return texts
    raise ValueError("a list of texts, none blank, or the path of a file of them")


def _plain(value: tuple[str, ...] | Path) -> list[str] | str:
    return str(value) if isinstance(value, Path) else list(value)


Texts = Annotated[tuple[str, ...] | Path, PlainValidator(_texts), PlainSerializer(_plain)]
"""Texts, or the path of a file of them: plain lines, or any other file that we read."""


def read_texts(value: tuple[str, ...] | Path, key: str) -> tuple[str, ...]:
    """Return the texts themselves, each once, in their order.

    Args:
        value: the texts, or their file. Of an item that is not plain text, the answer counts, and
            where it has none, the question.
        key: of the recipe, for the message.

    Raises:
        UserError: the file cannot be read, or holds no text.
    """
    if isinstance(value, Path):
        from bidistill.data.sources import read_items

        # by itself a .txt is a document
        format = "lines" if value.suffix.lower() in (".txt", ".md") else None
        items = read_items(value, format=format)
        found = (item.text or item.answer or item.question for item in items)
        texts = tuple(text.strip() for text in found if text and text.strip())
    else:
        texts = tuple(text.strip() for text in value)
    if not texts:
        raise UserError(f"{key}: got {value}, which holds no text, expected some; fill it in")
    return tuple(dict.fromkeys(texts))

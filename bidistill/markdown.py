"""Tables of Markdown, as the reports write them."""

import html
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table, without a line break at the end.

    Args:
        head: titles of the columns.
        rows: as many cells each; what must not be read as Markdown is `escaped` by the caller.
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escaped(text: str) -> str:
    """Any text in one cell of a table, shown as it is."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in "\\|`*_[]~" else char for char in plain)

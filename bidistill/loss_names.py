"""The names of the losses, for recipes: known without importing any of them, which takes seconds.

The losses themselves stand in ``losses.py``. A package may bring more: it names a
:class:`bidistill.losses.Loss` as an entry point of the group `GROUP`,

.. code-block:: toml

    [project.entry-points."bidistill.losses"]
    my_loss = "my_package.losses:MY_LOSS"

and, once it is installed, a recipe may say ``loss: my_loss``.
"""

from importlib.metadata import EntryPoint, entry_points

from bidistill.data.records import nearest
from bidistill.errors import UserError

GROUP = "bidistill.losses"
"""Entry points of this group are losses."""
BUILT_IN = (
    *("bidirectional_kl", "push_pull", "jsd", "topk_kl", "cross_entropy"),
    *("bild", "duet", "gradient_ascent", "unlikelihood", "npo", "simnpo", "flat", "rmu"),
)


def from_outside() -> dict[str, EntryPoint]:
    """The losses that other installed packages bring, by name.

    Raises:
        UserError: a name is taken already.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in BUILT_IN or found.setdefault(point.name, point).value != point.value:
            raise UserError(
                f"{GROUP}: got {point.name!r} as {point.value}, a name that another loss has, "
                "expected a new one; rename it, or remove its package"
            )
    return found


def checked(name: str) -> str:
    """Return the name of a loss.

    Raises:
        ValueError: there is none of this name; the message says what would have been expected.
    """
    known = (*BUILT_IN, *from_outside())
    if name not in known:
        raise ValueError(f"the name of a loss; {nearest(name, known)}")
    return name

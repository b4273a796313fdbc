"""Unlearning methods by name: what ``method: npo`` in a recipe stands for.

A method is a nested mapping in ``methods.yaml``, laid under the recipe key by key:

.. code-block:: text

    method < recipe < key=value on the command line

So weights, options and counts may be changed. What makes the method may not, as its name would lie:
which roles it trains, by which losses, and how their gradients are combined if it says so.

``objectives`` and ``data.per_step`` that are null count as not said. So a method runs by a recipe
that has some with ``method=npo objectives=null data.per_step=null``.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bidistill.data.records import nearest
from bidistill.errors import UserError
from bidistill.settings import laid, read

FILE = Path(__file__).with_name("methods.yaml")


@cache
def methods() -> Mapping[str, dict[str, Any]]:
    """All methods, by name."""
    return read(FILE)


def completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its method laid under it; one without a method stays as it is.

    Args:
        recipe: in plain values, not checked yet.

    Raises:
        UserError: there is no such method, or the recipe changes what makes it.
    """
    name = recipe.get("method")
    if name is None:
        return recipe
    if not isinstance(name, str) or name not in methods():
        raise UserError(
            f"method: got {name!r}, expected the name of a method; {nearest(str(name), methods())}"
        )
    method, recipe = methods()[name], _said(recipe)
    _require_own(name, method, recipe)
    return laid(method, recipe)


def _require_own(name: str, method: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuse other roles, losses or combiners than the method's."""
    objectives, way_out = method["objectives"], "leave it out, or leave method out"
    given = recipe.get("objectives")
    for role, objective in given.items() if isinstance(given, dict) else ():
        if role not in objectives:
            raise UserError(
                f"objectives.{role}: got one with method {name}, which trains "
                f"{', '.join(objectives)}, expected these alone; {way_out}"
            )
        own = objectives[role]["loss"]
        if isinstance(objective, dict) and objective.get("loss", own) != own:
            raise UserError(
                f"objectives.{role}.loss: got {objective['loss']} with method {name}, expected "
                f"{own}; {way_out}"
            )
    own = method.get("combine")
    if own is not None and recipe.get("combine", own) != own:
        raise UserError(
            f"combine: got {recipe['combine']} with method {name}, expected {own}; {way_out}"
        )


def _said(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the objectives and the counts that are null."""
    data = recipe.get("data")
    if isinstance(data, dict) and data.get("per_step", ...) is None:
        recipe = {**recipe, "data": {k: v for k, v in data.items() if k != "per_step"}}
    return {k: v for k, v in recipe.items() if (k, v) != ("objectives", None)}

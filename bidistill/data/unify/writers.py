"""Which model a recipe has write: a folder on this machine, or an endpoint."""

from pathlib import Path

from bidistill.data.unify.endpoint import Endpoint
from bidistill.data.unify.local_model import LocalModel
from bidistill.data.unify.writer import CACHE_NAME, Model, Writer, WriterConfig
from bidistill.errors import UserError


def make_writer(config: WriterConfig | None, cache_folder: Path | str) -> Writer | None:
    """Return the writer of a recipe; None where the recipe has no model.

    Nothing is loaded until a reply is needed that the cache does not hold.

    Args:
        config: the section ``model`` of the recipe.
        cache_folder: where replies are kept unless the recipe says otherwise.

    Raises:
        UserError: neither or both of a folder and an endpoint are given, or the one given cannot
            be used.
    """
    if config is None:
        return None
    if (config.path is None) == (config.endpoint is None):
        got = "neither" if config.path is None else "both"
        raise UserError(f"model: got {got} of path and endpoint, expected one; give one of them")
    if config.path is not None:
        model: Model = LocalModel(config)
    else:
        model = Endpoint(config)
    return Writer(model, Path(config.cache or cache_folder) / CACHE_NAME, config.max_tokens)

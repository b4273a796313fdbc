"""The model that is judged, from its files."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.loading import load_base


def load(
    model_dir: Path | str, adapter: Path | str | None = None, *, merge: bool = False
) -> PreTrainedModel:
    """Load a model, on the GPU if there is one, with its adapter.

    Args:
        model_dir: folder of the model.
        adapter: folder of a LoRA adapter, or None.
        merge: put the adapter's change into the weights themselves: so the model would be
            published, and so it is quantised.

    Raises:
        UserError: the model or the adapter cannot be read.
    """
    if adapter is not None and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter: got {adapter}, expected a folder with adapter_model.safetensors; "
            "give the folder that training saved"
        )
    model = load_base(model_dir)
    if adapter is None:
        return model
    adapted = PeftModel.from_pretrained(model, adapter)
    return adapted.merge_and_unload() if merge else adapted  # type: ignore

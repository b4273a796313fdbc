"""A low-rank change of a model that can be trained and then taken away without a trace.

It is LoRA, y = W x + B A x in every linear layer but the LM head, as hooks on the layers' outputs.
peft's own adapters would do, but on a model that wears one already they switch that one's flags;
hooks leave the weights and all that is set on them alone, whatever the model is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.models import unwrapped


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """All linear layers but the LM head and the parts of adapters.

    Raises:
        UserError: the model has none.
    """
    head = unwrapped(model).get_output_embeddings()
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    ]
    if not layers:
        raise UserError(
            "model: got one without linear layers below its head, expected some to change; "
            "leave out the attacks relearn and quantise"
        )
    return layers


@contextmanager
def low_rank(model: PreTrainedModel, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Within the context the model has a change of its own that starts at zero.

    Args:
        model: whose linear layers are changed.
        rank: of the change.
        seed: of A's first values, uniform as peft draws them; B starts at zero.

    Yields:
        The parameters to train, fp32.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters: list[nn.Parameter] = []
    handles = []
    for layer in linear_layers(model):
        start = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        a = nn.Parameter(start.to(layer.weight.device))
        b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))
        handles.append(layer.register_forward_hook(_adder(a, b)))
        parameters += [a, b]
    try:
        yield parameters
    finally:
        for handle in handles:
            handle.remove()


def _adder(a: Tensor, b: Tensor):  # noqa: ANN202
    """What adds B A x to the output of a layer. Shapes: A (R, in), B (out, R)."""

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return add

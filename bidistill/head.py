"""The LM head with an adapter on it, in the form that a fused loss takes: one matrix.

An adapted head gives logits ``h W^T + s drop(h) A^T B^T``. A fused loss reads rows of hidden states
and one head, and never builds logits. Two ways of making one head of the parts:

.. code-block:: text

    summed       h            with  W + s B A    (V, H)
    augmented    [h, s A h]   with  [W, B]       (V, H + R)      this one

Either costs one temporary of the head's size that lives until the backward, and one gradient of
that size, of which all but the adapter's part is dropped; augmented it is R/H larger. It was chosen
for what the sum cannot do: dropout applies to what goes into A; and in bf16 a small change is kept,
which the sum would round away beside W.

Neither would be needed if the fused losses took a second, low-rank product beside the first: the
logits of a chunk are then two products, and the gradient of B is the chunk's gradient times s A h.
That is not built. So for V 128,256 and H 4,096 in bf16 an adapter on the head takes 1.05 GB for the
temporary and as much for its gradient, where a frozen head takes neither.

Legend: N answer rows, H hidden width, V vocabulary, R rank.
"""

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor


def augmented(
    head: LoraLayer, hidden: Float[Tensor, "N H"]
) -> tuple[Float[Tensor, "N H+R"], Float[Tensor, "V H+R"]]:
    """Hidden states and a weight whose product is what the adapted ``head`` adds up to.

    Args:
        head: a linear layer with adapters; its bias, if it has one, is to be added as ever.
        hidden: what goes into it.

    Returns:
        Rows and a weight. With the adapters switched off, ``hidden`` and the base weight.

    Numerics: in the dtype of the base weight, so that nothing is widened.
    """
    rows, weights = [hidden], [head.weight]
    for name in () if head.disable_adapters else head.active_adapters:
        x = head._cast_input_dtype(hidden, head.lora_A[name].weight.dtype)  # type: ignore
        inner = head.lora_A[name](head.lora_dropout[name](x)) * head.scaling[name]
        rows.append(inner.to(hidden.dtype))
        weights.append(head.lora_B[name].weight.to(head.weight.dtype))  # type: ignore
    return torch.cat(rows, 1), torch.cat(weights, 1)  # type: ignore

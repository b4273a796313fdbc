"""Fused losses for torchtitan: of hidden states and the LM head, in place of its chunked loss.

torchtitan hands its LM head to a loss that is a ``ChunkedLossWrapper``, and lets the model return
hidden states. These losses are such, and read the head in one call instead of chunk by chunk. The
weight is gathered first where FSDP has shared it out; its gradient goes through the hooks of FSDP
with that of the norm, which torchtitan puts into the same unit.

.. code-block:: text

    FusedCrossEntropy    of the labels: torchtitan's own loss
    FusedDistillation    against a frozen model that may read another prompt before the answer

Legend: B sequences, L tokens, N tokens that count, D and E widths of student and teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bidistill.errors import MissingPackage, UserError
from bidistill.integrations.supported import check_loss
from bidistill.losses import find
from bidistill_kernels import linear_cross_entropy

try:
    from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
    from torchtitan.distributed.spmd_types import spmd_mesh_size
except ImportError as error:
    raise MissingPackage(
        f"torchtitan: got none that can be imported ({error}), expected 0.3; install it as "
        "docs/integrations/torchtitan.md says"
    ) from None

Result = tuple[Float[Tensor, ""], dict[str, Tensor]]


class FusedCrossEntropy(ChunkedLossWrapper):
    """Cross-entropy without logits: the sum over labels that count, over their global number.

    In a configuration ``loss=FusedCrossEntropy.Config()``, where torchtitan has
    ``loss=ChunkedLossWrapper.Config(...)``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """What a configuration may set."""

        chunk_bytes: int | None = None
        """Of logits that exist at a time; None: the kernels' own choice."""

    def __init__(self, config: Config, *, compile_config: object = None) -> None:
        """Keep the options; there is nothing to compile."""
        self.chunk_bytes = config.chunk_bytes
        self.lm_head = None

    def __call__(
        self,
        pred: Float[Tensor, "B L D"],
        labels: Int64[Tensor, "B L"],
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: object,
    ) -> Result:
        """Compute the loss; what torchtitan calls.

        Args:
            pred: hidden states after the last norm.
            labels: id of the next token; -100 where there is none.
            global_valid_tokens: divisor; None: the sum.
            **loss_inputs: ignored, as torchtitan's own loss does.

        Returns:
            The loss, nats, to be backpropagated; and no metrics.

        Raises:
            UserError: tensor parallelism, or a head that is more than a matrix product.
        """
        weight, bias = whole_head(self.lm_head, pred)
        loss = linear_cross_entropy(
            pred.flatten(0, 1),
            weight,
            labels.flatten(),
            student_bias=bias,
            ignore_index=IGNORE_INDEX,
            chunk_bytes=self.chunk_bytes,
            **_reduction(global_valid_tokens),
        )
        _let_go(self.lm_head, pred)
        return loss, {}


class FusedDistillation(ChunkedLossWrapper):
    """A loss between the model and a frozen teacher, by name, without logits of either.

    ``set_teacher(model)`` comes before the first call. Each call needs ``teacher_hidden``, made by
    `teacher_rows`: row n belongs to the n-th label that counts, so the teacher may have read
    another prompt before the same answers.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """What a configuration may set."""

        name: str = "bidirectional_kl"
        """A loss of `bidistill.losses` that reads both heads, such as ``jsd`` or ``push_pull``."""
        options: dict[str, Any] = field(default_factory=dict)
        """Of that loss: ``{"forward": 1.0, "reverse": 0.0}``."""
        chunk_bytes: int | None = None
        """Of logits that exist at a time; None: the kernels' own choice."""

    def __init__(self, config: Config, *, compile_config: object = None) -> None:
        """Look the loss up; there is nothing to compile."""
        check_loss(config.name, config.options)
        self.loss: Callable[..., Tensor] = partial(
            find(config.name).function, chunk_bytes=config.chunk_bytes, **config.options
        )
        self.lm_head = None
        self.teacher_head: nn.Module | None = None

    def set_teacher(self, teacher: nn.Module) -> None:
        """Compare with this model from now on: frozen, in evaluation, its head left to the loss."""
        teacher.requires_grad_(False).eval()
        teacher._skip_lm_head = True  # type: ignore - torchtitan's own switch
        self.teacher_head = teacher.lm_head  # type: ignore

    def __call__(
        self,
        pred: Float[Tensor, "B L D"],
        labels: Int64[Tensor, "B L"],
        global_valid_tokens: Tensor | None = None,
        *,
        teacher_hidden: Float[Tensor, "N E"] | None = None,
        **loss_inputs: object,
    ) -> Result:
        """Compute the loss; what torchtitan calls.

        Args:
            pred: hidden states after the last norm.
            labels: id of the next token; -100 where there is none.
            global_valid_tokens: divisor; None: the sum.
            teacher_hidden: what `teacher_rows` gave.
            **loss_inputs: ignored.

        Returns:
            The loss, nats, to be backpropagated; and no metrics.

        Raises:
            UserError: no teacher, other rows than labels, tensor parallelism, or a head that is
                more than a matrix product.
        """
        if self.teacher_head is None or teacher_hidden is None:
            missing = "set_teacher" if self.teacher_head is None else "teacher_hidden"
            raise UserError(
                f"{missing}: got none, expected a frozen teacher and its rows; call "
                "loss.set_teacher(model) once, and pass teacher_hidden=teacher_rows(...)"
            )
        weight, bias = whole_head(self.lm_head, pred)
        teacher_weight, teacher_bias = whole_head(self.teacher_head, teacher_hidden)
        counts = labels != IGNORE_INDEX
        hidden = pred[counts]
        if len(hidden) != len(teacher_hidden):
            raise UserError(
                f"teacher_hidden: got {len(teacher_hidden)} rows, expected {len(hidden)}, one for "
                "each label that counts; give both sides the same answers"
            )
        loss = self.loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            labels[counts],
            student_bias=bias,
            teacher_bias=teacher_bias,
            ignore_index=None,  # all that are left count
            **_reduction(global_valid_tokens),
        )
        _let_go(self.lm_head, pred)
        return loss, {}


@torch.no_grad()
def teacher_rows(
    teacher: nn.Module,
    tokens: Int64[Tensor, "B L"],
    labels: Int64[Tensor, "B L"],
    **model_inputs: Any,  # noqa: ANN401
) -> Float[Tensor, "N E"]:
    """Hidden states of the teacher for the labels that count.

    Args:
        teacher: given to ``set_teacher`` before.
        tokens: what it reads.
        labels: the answers, id of the next token; -100 elsewhere. They may stand at other places
            than the student's, in the same order.
        **model_inputs: ``positions``, ``attention_masks``: what the model takes besides.

    Returns:
        Constants, sequence by sequence.
    """
    return teacher(tokens, **model_inputs)[labels != IGNORE_INDEX]


def whole_head(head: nn.Module | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an LM head, gathered if FSDP has shared it out.

    Args:
        head: torchtitan's, a linear layer.
        hidden: what goes into it.

    Raises:
        UserError: it was not handed over, is more than a matrix product, or tensor-parallel.
    """
    if head is None:
        raise UserError("lm_head: got none, expected the model's; call set_lm_head(model.lm_head)")
    if type(head).forward is not nn.Linear.forward:
        raise UserError(
            f"lm_head: got a {type(head).__name__}, expected a plain linear layer; this model's "
            "logits are more than a product, so keep torchtitan's own loss"
        )
    if isinstance(head, FSDPModule):
        head.unshard()
    weight: Tensor = head.weight  # type: ignore
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor) or spmd_mesh_size("tp") > 1:
        raise UserError(
            "parallelism: got a tensor-parallel head or DTensor activations, expected plain "
            "tensors; set tensor_parallel_degree to 1 and another spmd_backend than full_dtensor"
        )
    return weight, head.bias  # type: ignore


def _reduction(global_valid_tokens: Tensor | None) -> dict[str, Any]:
    if global_valid_tokens is None:
        return {"reduction": "sum"}
    return {"num_items": global_valid_tokens}


def _let_go(head: nn.Module | None, hidden: Tensor) -> None:
    """Validation has no backward that would leave the ranks with their own parts again."""
    if isinstance(head, FSDPModule) and not hidden.requires_grad:
        head.reshard()

"""TRL's DistillationTrainer with our fused divergence in the place of its own.

.. code-block:: python

    from bidistill.integrations.trl import DistillationTrainer

instead of ``from trl import DistillationTrainer``: same loss, same options, same metrics. What
differs is the work: TRL projects both models' hidden states again in the backward, and once more
for a JSD; here the gradient of a chunk of logits is made with its loss, and nothing is projected
twice. Trained on 1.16.0. What is equal and what not: docs/integrations/trl.md.

Legend: B sequences, K completion tokens of the longest, N of them that count, V vocabulary, D and E
widths of student and teacher.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from bidistill.errors import MissingPackage, UserError
from bidistill.integrations.divergence import divergence
from bidistill_kernels import LogitTransform, linear_bidirectional_kl

try:
    from trl.trainer import distillation_trainer as _module
    from trl.trainer.distillation_trainer import DistillationTrainer as _DistillationTrainer
except ImportError as error:
    raise MissingPackage(
        f"trl: got no package that has a DistillationTrainer ({error}), expected trl 1.16 or "
        "later; pip install trl"
    ) from None


@torch.no_grad()
def total_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    **options: Any,  # noqa: ANN401
) -> Float[Tensor, ""]:
    """Sum of the rows' entropies, nats, without their logits.

    By KL(p || uniform) = log V - entropy: one projection, and a head of zeros for the uniform.

    Args:
        hidden: last hidden states.
        weight: the LM head.
        **options: bias, transform and weights of the rows, as `linear_bidirectional_kl` names them.
    """
    uniform = hidden.new_zeros(len(hidden), 1), weight.new_zeros(len(weight), 1)
    tensors = hidden, weight, *uniform
    kl = linear_bidirectional_kl(*tensors, forward=0.0, reverse=1.0, reduction="sum", **options)
    return options["token_weight"].sum() * math.log(len(weight)) - kl


def fused_divergence_loss(
    student_hidden_states: Float[Tensor, "B K D"],
    teacher_hidden_states: Float[Tensor, "B K E"],
    student_lm_head_weight: Float[Tensor, "V D"],
    teacher_lm_head_weight: Float[Tensor, "V E"],
    completion_mask: Int[Tensor, "B K"],
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Float[Tensor, " V"] | None = None,
    teacher_lm_head_bias: Float[Tensor, " V"] | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    *,
    entropy: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
    """Loss, sum of the student's entropies and number of tokens that count, as TRL's own function.

    Arguments are those of ``trl.trainer.distillation_trainer._chunked_divergence_loss`` of 1.16.0,
    where they are described.

    Args:
        student_hidden_states: differentiable.
        teacher_hidden_states: constants.
        student_lm_head_weight: differentiable.
        teacher_lm_head_weight: constant.
        completion_mask: nonzero where a token counts.
        beta: as in `bidistill.integrations.divergence.divergence`.
        num_items_in_batch: divisor of the sum; None: the tokens that count here.
        student_lm_head_bias: differentiable.
        teacher_lm_head_bias: constant.
        student_logit_scale: factor on the logits, before the soft-cap.
        teacher_logit_scale: likewise.
        student_final_logit_softcapping: the bound, or None.
        teacher_final_logit_softcapping: likewise.
        temperature: divisor of both models' logits after it.
        entropy: compute the entropies, for which the student is projected once more; else NaN.

    Raises:
        UserError: a trainable head of which a rank has only its part.
    """
    student_weight, student_bias = _plain("student", student_lm_head_weight, student_lm_head_bias)
    teacher_weight, teacher_bias = _plain("teacher", teacher_lm_head_weight, teacher_lm_head_bias)
    counts = (completion_mask.flatten() != 0).float()
    student = {
        "student_bias": student_bias,
        "student_transform": LogitTransform(
            student_logit_scale, student_final_logit_softcapping, temperature
        ),
        "token_weight": counts,
    }
    hidden = student_hidden_states.flatten(0, 1)
    loss = divergence(
        hidden,
        student_weight,
        teacher_hidden_states.flatten(0, 1),
        teacher_weight,
        beta,
        num_items=counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        teacher_transform=LogitTransform(
            teacher_logit_scale, teacher_final_logit_softcapping, temperature
        ),
        **student,
    )
    total = loss.new_full((), math.nan)
    if entropy:
        total = total_entropy(hidden, student_weight, **student)
    return loss, total, counts.sum().long()


def _plain(name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head as plain tensors.

    TRL gathers one that FSDP2 has shared out by ``full_tensor()``. Of a constant that is right. Of
    a trainable one the gradient is not: each rank keeps its rows of its own gradient, and the
    ranks' are never added up.
    """
    if hasattr(weight, "ds_id"):
        raise UserError(
            f"{name}_lm_head_weight: got one that DeepSpeed ZeRO-3 has shared out, expected a "
            "whole one; take ZeRO-2, FSDP, or TRL's own trainer"
        )
    if not isinstance(weight, DTensor):
        return weight, bias
    if name == "student" and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise UserError(
            "student_lm_head_weight: got a trainable head that FSDP2 has shared out as a unit of "
            "its own, expected one that its unit has gathered; leave the head in the root unit or "
            "with the final norm, or freeze it"
        )
    whole: Any = [None if t is None else t.detach().full_tensor() for t in (weight, bias)]  # type: ignore
    return whole[0], whole[1]


@contextmanager
def fused_divergence(*, entropy: bool = True) -> Iterator[None]:
    """Inside, TRL's trainer computes its loss by :func:`fused_divergence_loss`.

    For a trainer of which the class cannot be chosen: ``with fused_divergence(): trainer.train()``.

    Args:
        entropy: compute what TRL logs as ``entropy``.
    """
    name = "_chunked_divergence_loss"
    own = getattr(_module, name)

    def swapped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        return fused_divergence_loss(*args, **kwargs, entropy=entropy)

    setattr(_module, name, swapped)
    try:
        yield
    finally:
        setattr(_module, name, own)


class DistillationTrainer(_DistillationTrainer):
    """TRL's DistillationTrainer on our kernels; arguments and methods are TRL's."""

    log_entropy = True
    """Whether the student's entropy is computed and logged, as TRL does; it takes a projection."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As TRL's, by :func:`fused_divergence_loss`."""
        with fused_divergence(entropy=self.log_entropy):
            result = super().compute_loss(*args, **kwargs)
        if not self.log_entropy:
            assert self.model is not None
            del self._metrics["train" if self.model.training else "eval"]["entropy"]
        return result

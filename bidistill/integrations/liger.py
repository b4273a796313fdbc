"""Liger's two distillation losses by our kernels, under Liger's names and in Liger's order.

.. code-block:: python

    from bidistill.integrations.liger import LigerFusedLinearJSD

instead of ``from liger_kernel.transformers import LigerFusedLinearJSD`` is the whole change; the
package itself is not needed. What is equal and what is not: docs/integrations/liger.md.

Legend: N tokens (B T in Liger's documentation), V vocabulary, D and E widths of student and
teacher.
"""

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from bidistill.errors import UserError
from bidistill.integrations.divergence import divergence
from bidistill_kernels import LogitTransform, linear_kl_to_probs


class LigerFusedLinearJSD(nn.Module):
    """Generalised JSD of two heads' distributions; the KLs at both ends of beta.

    .. code-block:: text

        jsd_beta 0    KL(teacher || student)
        between       beta KL(teacher || m) + (1 - beta) KL(student || m),
                      m = beta teacher + (1 - beta) student
        1             KL(student || teacher)

    Args:
        jsd_beta: from 0 to 1.
        ignore_index: rows with this label are left out.
        temperature: divisor of both models' logits; the loss is not multiplied by its square.
        accum_dtype: as Liger's, and without effect: sums are in fp32 always.

    Raises:
        UserError: a number out of range, or sums that were to be wider than fp32.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> LigerFusedLinearJSD()(student, torch.eye(2), teacher, torch.eye(2), None)
        tensor(0.0285)
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        """Keep the settings, which may be changed between calls."""
        super().__init__()
        if not 0 <= jsd_beta <= 1:
            raise UserError(
                f"jsd_beta: got {jsd_beta}, expected a number from 0 to 1; pass 0 for the forward "
                "KL, 1 for the reverse KL"
            )
        _check(temperature, accum_dtype)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Float[Tensor, "N D"],
        student_weight: Float[Tensor, "V D"],
        teacher_input: Float[Tensor, "N E"],
        teacher_weight: Float[Tensor, "V E"],
        shift_labels: Integer[Tensor, " N"] | None,
    ) -> Float[Tensor, ""]:
        """Mean over the rows that are not ignored.

        Args:
            student_input: last hidden states.
            student_weight: the student's LM head.
            teacher_input: the teacher's hidden states; a constant.
            teacher_weight: the teacher's LM head; a constant.
            shift_labels: ids that only mark ignored rows; None: no row is.

        Returns:
            Nats per token, fp32 (fp64 for fp64 inputs); 0 if all rows are ignored.
        """
        tempered = LogitTransform(temperature=self.temperature)
        return divergence(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            self.jsd_beta,
            target=shift_labels,
            ignore_index=self.ignore_index,
            student_transform=tempered,
            teacher_transform=tempered,
        )


class LigerFusedLinearKLDivLoss(nn.Module):
    """KL of probabilities that are given to the student's distribution, sum q (log q - log p).

    Args:
        reduction: "batchmean": sum over the vocabulary, mean over the rows that are not ignored;
            "mean": that divided by V; "sum".
        ignore_index: rows with this label are left out.
        temperature: divisor of the student's logits alone.
        eps: lower bound of q inside its logarithm.
        accum_dtype: as Liger's, and without effect: sums are in fp32 always.

    Raises:
        UserError: a value out of range, or sums that were to be wider than fp32.

    Example:
        >>> probs = torch.tensor([[0.5, 0.5]])
        >>> LigerFusedLinearKLDivLoss()(torch.tensor([[1.0, 0.0]]), torch.eye(2), probs)
        tensor(0.1201)
    """

    def __init__(
        self,
        reduction: str | None = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        """Keep the settings, which may be changed between calls."""
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum"):
            raise UserError(
                f"reduction: got {reduction!r}, expected 'batchmean', 'mean' or 'sum'; for a loss "
                "per row call bidistill_kernels.linear_kl_to_probs with reduction='none'"
            )
        _check(temperature, accum_dtype)
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Float[Tensor, "N D"],
        student_weight: Float[Tensor, "V D"],
        target: Float[Tensor, "N V"],
        shift_labels: Integer[Tensor, " N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Reduce over the rows that are not ignored.

        Args:
            student_input: last hidden states.
            student_weight: the student's LM head.
            target: the teacher's probabilities, not renormalised; a constant.
            shift_labels: ids that only mark ignored rows; None: no row is.

        Returns:
            Nats, fp32 (fp64 for fp64 inputs); 0 if all rows are ignored.
        """
        loss = linear_kl_to_probs(
            student_input,
            student_weight,
            target.detach(),
            shift_labels,
            eps=self.eps,
            ignore_index=self.ignore_index,
            student_transform=LogitTransform(temperature=self.temperature),
            reduction="sum" if self.reduction == "sum" else "mean",
        )
        return loss / target.shape[1] if self.reduction == "mean" else loss


def _check(temperature: float, accum_dtype: torch.dtype | None) -> None:
    """Refuse what both losses would have to refuse later, or could not give."""
    if not temperature > 0:
        raise UserError(
            f"temperature: got {temperature}, expected a number above 0; pass 1 for none"
        )
    if accum_dtype == torch.float64:
        raise UserError(
            "accum_dtype: got torch.float64, expected torch.float32 or None; pass inputs in "
            "float64 for sums in float64"
        )

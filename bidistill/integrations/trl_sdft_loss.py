"""The losses of TRL's SDFTTrainer on hidden states and heads, by ``distillation_mode``.

.. code-block:: text

    full_logits      the fused KLs and JSD: no logits are made again in the backward
    sampled_token    the fused cross-entropy
    topk_logits      TRL's own function on a chunk of logits, made again in the backward: the ids
                     are the student's own best, which the fused top-K KL has no form for

Legend: N tokens, V vocabulary, D hidden width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

from bidistill.errors import UserError
from bidistill.integrations.divergence import divergence
from bidistill_kernels import LogitTransform, linear_cross_entropy

CHUNK_BYTES = 64 << 20
"""Of both models' logits that exist at a time for ``topk_logits``, unless the trainer says."""


class Model(NamedTuple):
    """Rows of one model and its head, as it is within its own forward."""

    hidden: Float[Tensor, "N D"]
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None

    def detach(self) -> "Model":
        """The same as constants."""
        bias = None if self.bias is None else self.bias.detach()
        return Model(self.hidden.detach(), self.weight.detach(), bias)


class Losses(NamedTuple):
    """The settings of a trainer."""

    args: SDFTConfig
    transform: LogitTransform
    """Of both models: they have one config, and one temperature."""
    chunk_bytes: int | None

    def run(
        self, student: Model, teacher: Model, ids: Int64[Tensor, " N"], weight: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """Run the mode that the trainer is set to.

        Args:
            student: differentiable.
            teacher: constants.
            ids: the tokens of the completions.
            weight: factor on the loss of each row, a constant; rows of weight 0 are left out.

        Returns:
            The weighted sum over rows, and the unweighted loss of each row, detached; nats.
        """
        mode, alpha = self.args.distillation_mode, self.args.distillation_alpha
        if mode == "full_logits":
            total, stats = divergence(
                *student[:2],
                *teacher[:2],
                alpha,
                student_bias=student.bias,
                teacher_bias=teacher.bias,
                student_transform=self.transform,
                teacher_transform=self.transform,
                token_weight=weight,
                reduction="sum",
                return_stats=True,
                chunk_bytes=self.chunk_bytes,
            )
            return total, stats.per_token
        if mode == "sampled_token":
            counts = (weight != 0).float()
            own = self.log_prob(student, ids, counts)
            with torch.no_grad():
                other = self.log_prob(teacher, ids, counts)
            per_token = (own - other).detach() * own
        else:
            per_token = self._by_top_ids(student, teacher, (weight != 0).nonzero().squeeze(1))
        return per_token @ weight, per_token.detach()

    def log_prob(
        self, model: Model, ids: Int64[Tensor, " N"], counts: Float[Tensor, " N"]
    ) -> Float[Tensor, " N"]:
        """Log-probability of each token, nats; 0 where ``counts`` is.

        Args:
            model: whose.
            ids: the tokens.
            counts: 1, or 0 for rows that are left out.
        """
        return -linear_cross_entropy(
            *model[:2],
            ids,
            student_bias=model.bias,
            student_transform=self.transform,
            token_weight=counts,
            ignore_index=None,
            reduction="none",
            chunk_bytes=self.chunk_bytes,
        )

    def _by_top_ids(self, student: Model, teacher: Model, rows: Tensor) -> Float[Tensor, " N"]:
        """TRL's loss on the student's best ids; 0 at other rows than the given."""
        if self.args.distillation_topk is None:
            raise UserError(
                "distillation_topk: got None with distillation_mode='topk_logits', expected a "
                "number of ids; set it, or take 'full_logits'"
            )
        size = max(1, (self.chunk_bytes or CHUNK_BYTES) // (8 * len(student.weight)))
        parts = [
            checkpoint(
                self._top_chunk,
                Model(student.hidden[chunk], *student[1:]),
                Model(teacher.hidden[chunk], *teacher[1:]),
                use_reentrant=False,
            )
            for chunk in rows.split(size)
        ]
        # connected to the student also where nothing counts: DDP waits for all gradients
        per_token: Any = 0 * student.hidden.float().sum(-1)
        return per_token.index_put((rows,), torch.cat([per_token[:0], *parts]))

    def _top_chunk(self, student: Model, teacher: Model) -> Tensor:
        own, other = (self.transform(F.linear(*model).float()) for model in (student, teacher))
        return compute_topk_self_distillation_loss(
            own,
            other,
            distillation_topk=self.args.distillation_topk,  # type: ignore
            distillation_alpha=self.args.distillation_alpha,
            distillation_add_tail=self.args.distillation_add_tail,
        )

"""A fused distillation loss as a ``LightningModule``, for Lightning's ``Trainer``.

Lightning divides the loss of each batch by ``accumulate_grad_batches``, so of batches with unlike
numbers of answer tokens it takes the mean of means, and of a short last window too little. Here the
gradients of the *sums* are added up, and divided once, before clipping and the optimiser, by the
number of answer tokens of the whole window on all ranks. So the update does not depend on the cut.

Legend: B pairs, T and S tokens of the longest that student and teacher read.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bidistill.data.padded import IGNORED
from bidistill.errors import MissingPackage, UserError
from bidistill.integrations.attach import Kind, attach

try:
    from lightning.pytorch import LightningModule
except ImportError:
    try:
        from pytorch_lightning import LightningModule
    except ImportError as error:
        raise MissingPackage(
            f"lightning: got none that can be imported ({error}), expected lightning 2; "
            "pip install lightning"
        ) from None

Batch = Mapping[str, Tensor]
"""What `bidistill.integrations.collator.PairCollator` makes."""


class DistillationModule(LightningModule):  # type: ignore - one of two
    """A transformers model that is trained to predict answers as a teacher does.

    Its batches are `bidistill.integrations.collator.PairCollator`'s. It logs nats per answer token:
    ``train_loss`` of each batch of this rank, and ``val_loss`` of all validation batches.
    Optimisation is automatic, so precision, clipping, accumulation, schedulers and callbacks are
    the Trainer's business.

    Args:
        model: a causal language model of transformers, or the PeftModel around one; it is put into
            training, for Lightning leaves the evaluation mode of a loaded model as it is.
        optimizer: is called with the trainable parameters when the fit begins, and returns an
            optimiser or whatever else ``configure_optimizers`` may: ``partial(AdamW, lr=1e-4)``.
        loss: name of a loss of `bidistill.losses` that compares LM heads.
        teacher: see `bidistill.integrations.attach.attach`. A model is moved to the device of the
            batches, and is no part of checkpoints.
        options: of the loss.
        temperature: divisor of both models' logits.
        chunk_bytes: of logits that exist at a time; None: the kernels' own choice.

    Raises:
        UserError: what `attach` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], Any],
        loss: str = "bidirectional_kl",
        *,
        teacher: Kind | nn.Module = "auto",
        options: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        chunk_bytes: int | None = None,
    ) -> None:
        """Attach the loss to the model."""
        super().__init__()
        self.model = attach(
            model,
            loss,
            teacher=teacher,
            options=options,
            temperature=temperature,
            chunk_bytes=chunk_bytes,
        ).train()
        self._make_optimizer = optimizer
        # in a tuple it is no submodule: not saved, not shared out, not trained
        self._teacher = (teacher,) if isinstance(teacher, nn.Module) else ()
        self._counted: Tensor | int = 0

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Call the factory with what trains."""
        return self._make_optimizer(p for p in self.model.parameters() if p.requires_grad)

    def on_fit_start(self) -> None:
        """Refuse a strategy that keeps the gradients to itself."""
        strategy = type(self.trainer.strategy).__name__
        if "DeepSpeed" in strategy:
            raise UserError(
                f"strategy: got {strategy}, expected one whose gradients can be scaled before the "
                "optimiser; take ddp"
            )

    def on_train_start(self) -> None:
        """Forget what an interrupted fit has counted of a window that it did not end."""
        self._counted = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Sum the loss over the answer tokens of a batch, and count them."""
        total, count = self._summed(batch)
        self._counted = self._counted + count
        self.log("train_loss", total.detach() / count.clamp(min=1), prog_bar=True)
        return total * self.trainer.accumulate_grad_batches  # by which Lightning divides it

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean over all answer tokens of the epoch and the ranks."""
        total, count = self._summed(batch)
        mean = total / count.clamp(min=1)
        self.log("val_loss", mean, batch_size=int(count), sync_dist=True, prog_bar=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the answer tokens of the window, before they are clipped."""
        counted = torch.as_tensor(self._counted, device=self.device)
        everywhere = self.trainer.strategy.reduce(counted.clone(), reduce_op="sum")
        # the strategy has averaged the gradients of the ranks; the loss is a sum over them
        scale = self.trainer.world_size / everywhere.clamp(min=1)  # type: ignore
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self._counted = 0

    def _summed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the loss, and the number of answer tokens."""
        for teacher in self._teacher:  # here, as a validation needs no fit before it
            teacher.to(batch["input_ids"].device)
        total: Tensor = self.model(**batch, num_items_in_batch=1).loss
        return total, (batch["shift_labels"] != IGNORED).sum()

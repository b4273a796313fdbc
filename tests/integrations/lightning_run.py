"""Runs of Lightning that tests compare; as a script, one of them on the ranks of torchrun."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from bidistill.integrations.collator import PairCollator
from bidistill.integrations.lightning import DistillationModule
from examples.lightning_module import trainer
from examples.tiny import make_pairs, tiny_llama
from tests.trainer.cut import double


class Recorder(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of each step."""

    kept: list[dict[int, Tensor]]

    def step(self, closure=None):
        loss = super().step(closure)
        parameters = self.param_groups[0]["params"]
        self.kept = [*getattr(self, "kept", []), [p.grad.clone() for p in parameters]]
        return loss


def pair_of_models(wide: bool):
    student, teacher = tiny_llama(), tiny_llama()
    if wide:
        double(student)
        double(teacher)
    return student, teacher


def fit(batch_size: int, *, wide: bool = True, pairs=None, **options):
    """Train; return the module, whose optimiser has all gradients."""
    student, teacher = pair_of_models(wide)
    module = DistillationModule(student, partial(Recorder, lr=1e-2), teacher=teacher)
    loader = DataLoader(pairs or make_pairs(), batch_size, collate_fn=PairCollator(padding=1))
    running = trainer(**options)
    running.fit(module, loader)
    return module, running


def gradients(running) -> list[dict[str, Tensor]]:
    """Of each step, by the name of the parameter."""
    (optimizer,) = running.optimizers
    names = [name for name, _ in running.lightning_module.model.named_parameters()]
    return [dict(zip(names, kept, strict=True)) for kept in optimizer.kept]


if __name__ == "__main__":
    _, running = fit(2, devices=2, strategy="ddp", accumulate_grad_batches=2, max_epochs=2)
    if running.is_global_zero:
        torch.save(gradients(running), sys.argv[1])

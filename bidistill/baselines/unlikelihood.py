"""Unlearning cross-entropy (UCE): make each token less likely, with a bounded gradient.

loss_n = -log(1 - p_n / 2), between 0 at p = 0 and log 2 at p = 1; d loss / d log p =
(p/2) / (1 - p/2), at most 1, and it fades as p does: what is forgotten already is left alone.
Source: MOLLM, arXiv:2412.20412. The formula is that of FedOSD, by the same first author; that the
two are equal is our reading.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers


def unlikelihood(answers: Answers) -> Float[Tensor, " N"]:
    """-log(1 - p/2) of each token, nats."""
    return -torch.log1p(-0.5 * torch.exp(-answers.nll))

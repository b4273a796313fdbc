"""Gradient ascent: make each token of what is to be forgotten less likely.

loss_n = log p_n; it has no lower bound, so few steps or a small rate must end it.
Source: the usual baseline, named so since Jang et al. 2022, arXiv:2210.01504.
"""

from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers


def gradient_ascent(answers: Answers) -> Float[Tensor, " N"]:
    """Log-likelihood of each token, nats: descending it ascends the negative one."""
    return -answers.nll

"""Negative preference optimisation: the lower half of DPO, with the base model as reference.

loss_a = -(2 / beta) log sigmoid(-beta (log pi(y_a) - log pi_0(y_a))), log-probabilities of whole
answers. Its gradient is that of gradient ascent times 2 sigmoid(beta (log pi - log pi_0)): 1 where
the student equals the base model, and it fades as the answer becomes less likely than it was. For
beta -> 0 it is gradient ascent.
Source: Zhang et al. 2024, arXiv:2404.05868.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers
from bidistill_kernels._checks import check_number


def npo(answers: Answers, *, beta: float = 0.1) -> Float[Tensor, " N"]:
    """Loss of each answer, on its first row.

    Args:
        answers: with the likelihoods of the base model, which has read no context.
        beta: inverse temperature, above 0.

    Raises:
        ValueError: beta is not above 0.
    """
    check_number("beta", beta, 0, open_ends=True)
    assert answers.base_nll is not None
    log_ratio_A = answers.sum(answers.base_nll - answers.nll)
    return answers.once(-2 / beta * F.logsigmoid(-beta * log_ratio_A))

"""SimNPO: negative preference optimisation by the mean likelihood of a token, without a reference.

loss_a = -(2 / beta) log sigmoid(beta (nll_a / |y_a| - delta)), nll summed over the answer of |y_a|
tokens. The paper's margin is gamma = beta delta.
Source: Fan et al. 2024, arXiv:2410.07163, in the form of the authors' code.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers
from bidistill_kernels._checks import check_number


def simnpo(answers: Answers, *, beta: float = 0.75, delta: float = 0.0) -> Float[Tensor, " N"]:
    """Loss of each answer, on its first row.

    Args:
        answers: the likelihoods.
        beta: inverse temperature, above 0.
        delta: nats per token of the answer at which the gradient's weight is half.

    Raises:
        ValueError: beta is not above 0, or delta is negative.
    """
    check_number("beta", beta, 0, open_ends=True)
    check_number("delta", delta, 0)
    return answers.once(-2 / beta * F.logsigmoid(beta * (answers.mean(answers.nll) - delta)))

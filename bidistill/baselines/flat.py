"""FLAT: an f-divergence between template answers, which are to be likely, and those to forget.

With P the mean probability of an answer's tokens, a template answer has loss -g(P) and one that is
to be forgotten h(P), h = f* of g:

==========  ====================  ==================
divergence  g(v)                  h(v)
==========  ====================  ==================
tv          tanh(v) / 2           tanh(v) / 2
kl          v                     exp(v - 1)
js          log 2 - softplus(-v)  softplus(v) - log 2
pearson     v                     v^2 / 4 + v
==========  ====================  ==================

Source: Wang et al. 2024, arXiv:2410.11143, and UCSC-REAL/FLAT; g and f* are those of f-GAN (Nowozin
et al. 2016, arXiv:1606.00709). The authors' code takes one P for all answers of a batch, over all
positions, with 0 at those of prompt and padding; here P is an answer's own, over its tokens alone.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bidistill.baselines.answers import Answers
from bidistill_kernels._checks import check_choice

Side = Literal["template", "forget"]
Divergence = Literal["tv", "kl", "js", "pearson"]
PARTS: dict[Divergence, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tv": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "js": (lambda v: math.log(2) - F.softplus(-v), lambda v: F.softplus(v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v * v / 4 + v),
}


def flat(
    answers: Answers, *, side: Side = "template", divergence: Divergence = "tv"
) -> Float[Tensor, " N"]:
    """Loss of each answer, on its first row; no unit.

    Args:
        answers: the likelihoods.
        side: whether the answers are to be given or to be forgotten.
        divergence: between the two.

    Raises:
        ValueError: an unknown side or divergence.
    """
    check_choice("side", side, get_args(Side))
    check_choice("divergence", divergence, get_args(Divergence))
    wanted, unwanted = PARTS[divergence]
    probability_A = answers.mean(torch.exp(-answers.nll))
    return answers.once(-wanted(probability_A) if side == "template" else unwanted(probability_A))

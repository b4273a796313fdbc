"""The losses of the trainer, by name: what each reads of a step.

.. code-block:: text

    reads        the function is given                                       and returns
    head         hidden rows and heads: one fused call with the LM head      sum, statistics
    likelihood   the answers' negative log-likelihoods, from a fused call    a number for each row
    layer        the rows that leave one transformer block                   a number for each row

No loss is given logits: at N rows and V ids they would take 4 N V bytes.

Legend: N answer rows, V vocabulary.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bidistill.baselines.duet import linear_duet
from bidistill.baselines.flat import flat
from bidistill.baselines.gradient_ascent import gradient_ascent
from bidistill.baselines.npo import npo
from bidistill.baselines.rmu import rmu
from bidistill.baselines.simnpo import simnpo
from bidistill.baselines.unlikelihood import unlikelihood
from bidistill.errors import UserError
from bidistill.loss_names import GROUP, from_outside
from bidistill.topk import topk_kl
from bidistill_kernels import (
    linear_bidirectional_kl,
    linear_bild,
    linear_cross_entropy,
    linear_jsd,
    linear_push_pull,
)


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss and what it reads."""

    function: Callable[..., Any]
    """Its keyword-only arguments are the options that a recipe may give; each has a default.

    Of a loss that reads ``likelihood``: called with `bidistill.baselines.answers.Answers`. Of one
    that reads a ``layer``: with the student's and the base model's rows, and ``layer`` is among its
    options. Both return shape (N,), differentiable. Of one that reads the ``head``: called as
    `bidistill_kernels.linear_jsd` is, or as `linear_cross_entropy` if there is no teacher.
    """
    reads: Literal["head", "likelihood", "layer"] = "head"
    teacher: bool = True
    """Whether it compares with a teacher."""

    def options(self) -> dict[str, inspect.Parameter]:
        """Its options, by name."""
        parameters = inspect.signature(self.function).parameters.values()
        # what all losses have in common comes in **options, and is the trainer's business
        return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: Mapping[str, Loss] = {
    "bidirectional_kl": Loss(linear_bidirectional_kl),
    "push_pull": Loss(linear_push_pull),
    "jsd": Loss(linear_jsd),
    "topk_kl": Loss(topk_kl),
    "cross_entropy": Loss(linear_cross_entropy, teacher=False),
    "bild": Loss(linear_bild),
    "duet": Loss(linear_duet),
    "gradient_ascent": Loss(gradient_ascent, "likelihood", teacher=False),
    "unlikelihood": Loss(unlikelihood, "likelihood", teacher=False),
    "npo": Loss(npo, "likelihood"),
    "simnpo": Loss(simnpo, "likelihood", teacher=False),
    "flat": Loss(flat, "likelihood", teacher=False),
    "rmu": Loss(rmu, "layer"),
}


def find(name: str) -> Loss:
    """Return the loss of a name that a recipe may give.

    Raises:
        UserError: another package brings it, and it cannot be imported or is no `Loss`.
    """
    if name in LOSSES:
        return LOSSES[name]
    point = from_outside()[name]
    try:
        loss = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{GROUP}: got {name!r} as {point.value}, which cannot be imported ({error}), expected "
            "a bidistill.losses.Loss; mend its package, or remove it"
        ) from None
    if not isinstance(loss, Loss):
        raise UserError(
            f"{GROUP}: got {name!r} as {point.value}, which is a {type(loss).__name__}, expected a "
            "bidistill.losses.Loss; wrap the function in one"
        )
    return loss

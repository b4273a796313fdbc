"""Logit transform z -> softcap(scale * z) / temperature on the first `vocab_limit` ids.

z1 = scale * z0;  z2 = softcap * tanh(z1 / softcap), if any;  s = z2 / temperature.
With g = dL/ds: dL/dz0 = g * (1 - (z2 / softcap)^2) * scale / temperature.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to the raw product of hidden state and head before its softmax.

    Args:
        scale: factor on the raw logits (`logit_scale`; 1 / `logits_scaling` for granite).
        softcap: bound c of c * tanh(z / c) (`final_logit_softcapping`), or None.
        temperature: divisor of the capped logits. The loss is not multiplied by its square.
        vocab_limit: number of ids that exist; head rows beyond it are padding and take no part.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> import torch
        >>> LogitTransform(scale=2.0, temperature=4.0, vocab_limit=2)(torch.tensor([2.0, 4.0, 9.0]))
        tensor([1., 2.])
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that make no transform."""
        if not 0 < abs(self.scale) < math.inf:
            raise ValueError(f"scale: got {self.scale}, expected a finite number other than 0")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"softcap: got {self.softcap}, expected a finite number above 0; pass None for none"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature: got {self.temperature}, expected a finite number above 0"
            )
        if self.vocab_limit is not None and not isinstance(self.vocab_limit, int):
            raise TypeError(f"vocab_limit: got {self.vocab_limit!r}, expected a whole number")
        if self.vocab_limit is not None and self.vocab_limit < 1:
            raise ValueError(
                f"vocab_limit: got {self.vocab_limit}, expected at least 1; pass None for no limit"
            )

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the final logits of raw ones, shape (..., V) to (..., min(V, vocab_limit))."""
        logits = logits[..., : self.vocab_limit] * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return logits / self.temperature

    def apply_(self, logits_CV: Tensor) -> Tensor:
        """Do the same in place and without autograd, to logits cut to the limit already."""
        if self.scale != 1:
            logits_CV.mul_(self.scale)
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1:
            logits_CV.div_(self.temperature)
        return logits_CV

    @property
    def factor(self) -> float:
        """Constant part of the derivative."""
        return self.scale / self.temperature

    def slope(self, logits_CV: Tensor) -> Tensor:
        """Return the part of the derivative that the soft-cap adds, from the final logits."""
        assert self.softcap is not None
        return 1 - (logits_CV * (self.temperature / self.softcap)).square_()

    def pack(self) -> list[float]:
        """Return the four numbers as an operation's schema carries them; 0 stands for None."""
        return [self.scale, self.softcap or 0.0, self.temperature, float(self.vocab_limit or 0)]

    @classmethod
    def unpack(cls, numbers: list[float]) -> "LogitTransform":
        """Return the transform that `pack` wrote."""
        scale, softcap, temperature, vocab_limit = numbers
        return cls(scale, softcap or None, temperature, int(vocab_limit) or None)

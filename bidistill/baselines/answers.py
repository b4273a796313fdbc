"""What a loss of likelihoods sees of a step: how likely each token of each answer is.

The negative log-likelihoods come from one fused call with the LM head, and a loss is a function of
them: its gradient goes back into that call row by row, so logits are never kept.

A loss is per token, or per answer: then its value counts once, whatever the answer's length. Either
way it is a number for each row, and the trainer adds the rows up and divides by their count in the
step, as it does for all losses. For losses per answer that divisor is larger than the number of
answers, by their mean length; one divisor for all keeps a step independent of how it is cut up, and
the weight of the role is there to make up for it.

Legend: N rows that count, A answers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Answers(NamedTuple):
    """Answers, token by token. Rows that do not count belong to none; every answer has a row."""

    nll: Float[Tensor, " N"]
    """-log p of each token under the student, nats; differentiable."""
    base_nll: Float[Tensor, " N"] | None
    """The same under the teacher, a constant; None for a loss that compares with none."""
    answer: Int64[Tensor, " N"]
    """Which answer each row belongs to, ascending from 0."""
    first: Int64[Tensor, " A"]
    """The first row of each answer."""
    length: Int64[Tensor, " A"]
    """Rows of each answer."""

    @classmethod
    def of(
        cls,
        nll: Float[Tensor, " N"],
        base_nll: Float[Tensor, " N"] | None,
        sequence: Int64[Tensor, " N"],
    ) -> "Answers":
        """Group rows by their sequences.

        Args:
            nll: of the student's tokens.
            base_nll: of the teacher's.
            sequence: number of the sequence that each row belongs to, ascending, on the CPU.
        """
        _, answer, length = sequence.unique_consecutive(return_inverse=True, return_counts=True)
        first = length.cumsum(0) - length
        where = nll.device
        return cls(nll, base_nll, answer.to(where), first.to(where), length.to(where))

    def sum(self, values: Float[Tensor, " N"]) -> Float[Tensor, " A"]:
        """Sum over the tokens of each answer."""
        return values.new_zeros(len(self.length)).index_add(0, self.answer, values)

    def mean(self, values: Float[Tensor, " N"]) -> Float[Tensor, " A"]:
        """Mean over the tokens of each answer."""
        return self.sum(values) / self.length

    def once(self, values: Float[Tensor, " A"]) -> Float[Tensor, " N"]:
        """A number for each row that counts each answer's value once: on its first row, else 0.

        Example:
            >>> answers = Answers.of(torch.ones(3), None, torch.tensor([4, 4, 7]))
            >>> answers.once(torch.tensor([5.0, 6.0])).tolist()
            [5.0, 0.0, 6.0]
        """
        return torch.zeros_like(self.nll).index_add(0, self.first, values)

"""What a store keeps of each answer token: hidden states, or the best ids.

.. code-block:: text

    kind    tensors of a file                        bytes a token         losses
    hidden  hidden BF16 (n, H)                       2 H, and a head once  all
    topk    ids U16 (n, K), log_probs F16 (n, K + 1) 4 K + 2               topk_kl
            ids I32 where V > 65,536                 6 K + 2

Legend: n rows of a file, N answer rows of a pack or a batch, H hidden width, K ids, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from bidistill.data.views import Example
from bidistill.teacher.compute import frozen_head, run_teacher, teacher_rows
from bidistill.teacher.rows import TeacherRows, TeacherTopK
from bidistill_kernels import LogitTransform, topk_log_probs

Head: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Weight and bias of a head; None where there is none, or the student's serves."""
UINT16_IDS = 2**16
"""Ids of a vocabulary that two bytes tell apart."""


class Column(NamedTuple):
    """A tensor of which each answer token has a row."""

    dtype: torch.dtype
    """On disk."""
    width: int


class Form(Protocol):
    """What is kept, and how it is made."""

    kind: str

    def columns(self, model: nn.Module) -> dict[str, Column]:
        """What the files of rows have, by name."""
        ...

    def rows(self, model: nn.Module, examples: Sequence[Example]) -> Sequence[Mapping[str, Tensor]]:
        """Run the teacher over one pack: the columns of each example, as they are computed."""
        ...

    def head(self, model: nn.Module) -> Head:
        """Head that is kept beside the rows."""
        ...


class Hidden:
    """The last hidden states, from which the student's step computes all logits again.

    Args:
        own_head: whether the teacher's model is another one than the student, and its head is to
            be kept.
    """

    kind = "hidden"

    def __init__(self, *, own_head: bool = False) -> None:
        """Keep the setting."""
        self.own_head = own_head

    def columns(self, model: nn.Module) -> dict[str, Column]:
        """One row of the model's width."""
        return {"hidden": Column(torch.bfloat16, _head_shape(model)[1])}

    def rows(self, model: nn.Module, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Hidden rows."""
        return [{"hidden": rows} for rows in teacher_rows(model, examples)]

    def head(self, model: nn.Module) -> Head:
        """A copy, unless the student's serves."""
        return frozen_head(model, own=self.own_head)

    @staticmethod
    def read(columns: Mapping[str, Tensor], computed: torch.dtype, head: Head) -> TeacherRows:
        """Rows in the dtype in which they were computed."""
        return TeacherRows(columns["hidden"].to(computed), *head)


class Best:
    """The K best ids, their log-probabilities, and that of all other ids together.

    Args:
        k: ids to keep; more than the vocabulary means all.
        transform: what the teacher does to the output of its head.
    """

    kind = "topk"

    def __init__(self, k: int, transform: LogitTransform) -> None:
        """Keep the settings."""
        self.k = k
        self.transform = transform

    def columns(self, model: nn.Module) -> dict[str, Column]:
        """Ids in the smallest type that has them; one log-probability more than ids."""
        vocabulary = _head_shape(model)[0]
        ids = torch.uint16 if vocabulary <= UINT16_IDS else torch.int32
        k = min(self.k, self.transform.vocab_limit or vocabulary, vocabulary)
        return {"ids": Column(ids, k), "log_probs": Column(torch.float16, k + 1)}

    def rows(self, model: nn.Module, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Ids and log-probabilities; of all logits there is a chunk of rows at a time."""
        best = run_teacher(model, examples, self._best)
        lengths = [len(example.answer_ids) for example in examples]
        parts = zip(*(tensor.cpu().split(lengths) for tensor in best), strict=True)
        return [{"ids": ids, "log_probs": log_probs} for ids, log_probs in parts]

    def _best(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids (N, K) and log-probabilities (N, K + 1), the last one of all that is left."""
        best = topk_log_probs(hidden, weight, self.k, teacher_bias=bias, transform=self.transform)
        # the sum of the probabilities is 1 less the rest to a few 1e-7, so the rest may seem to be
        # a little below 0
        kept = best.values.double().logsumexp(-1, keepdim=True)
        rest = (-kept.expm1()).clamp(min=0).log()
        return best.ids, torch.cat([best.values, rest.to(best.values.dtype)], dim=1)

    def head(self, model: nn.Module) -> Head:
        """None: no logits are computed again."""
        return None, None

    @staticmethod
    def read(columns: Mapping[str, Tensor], computed: torch.dtype, head: Head) -> TeacherTopK:
        """Ids and log-probabilities that add up to 1 again, with those of the other ids."""
        outcomes = columns["log_probs"].to(torch.promote_types(computed, torch.float32))
        return TeacherTopK(columns["ids"].long(), outcomes.log_softmax(-1)[:, :-1])


FORMS: dict[str, type[Hidden] | type[Best]] = {form.kind: form for form in (Hidden, Best)}
"""By the word for it in the header of a store."""


def _head_shape(model: nn.Module) -> tuple[int, int]:
    """Vocabulary and width of a model."""
    return tuple(model.get_output_embeddings().weight.shape)  # type: ignore

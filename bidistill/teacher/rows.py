"""What a loss is given of a teacher: hidden rows and a head, or the best ids of each row.

Plain objects on purpose: FSDP2 casts every floating tensor among the arguments of a hooked forward,
also inside lists, dicts and dataclasses, and would round the teacher's numbers.

Legend: N answer rows, H hidden width, V vocabulary, K ids a row.
"""

from jaxtyping import Float, Integer
from torch import Tensor

from bidistill_kernels import TopK


class TeacherRows:
    """Last hidden states of the teacher for the answer rows of a step, and the head they need.

    Args:
        hidden: the rows. Shape (N, H).
        weight: the teacher's head, shape (V, H); None: the student's own without its adapter.
        bias: the bias of that head, shape (V,).
    """

    __slots__ = ("bias", "hidden", "weight")

    def __init__(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"] | None = None,
        bias: Float[Tensor, " V"] | None = None,
    ) -> None:
        """Keep the tensors as they are."""
        self.hidden = hidden
        self.weight = weight
        self.bias = bias


class TeacherTopK:
    """The K best ids of the teacher for the answer rows of a step; there is no head.

    Args:
        ids: token ids, best first. Shape (N, K), int64.
        values: their log-probabilities in the teacher's whole vocabulary, shape (N, K); -inf where
            the teacher has no more ids.
    """

    __slots__ = ("ids", "values")

    def __init__(self, ids: Integer[Tensor, "N K"], values: Float[Tensor, "N K"]) -> None:
        """Keep the tensors as they are."""
        self.ids = ids
        self.values = values

    def at(self, index: Integer[Tensor, " R"], k: int | None = None) -> TopK:
        """The rows of an index, where that lies; of each row the ``k`` best ids.

        Args:
            index: of rows.
            k: ids that count; more than there are means all, and so does None.
        """
        columns = (tensor[:, :k].to(index.device) for tensor in (self.ids, self.values))
        return TopK(*(column.index_select(0, index) for column in columns))

"""A head whose rows are shared out among ranks: tensor parallelism over the vocabulary.

Every rank has the same hidden states and some rows of the head. Its logits are those of its own
ids; what a loss sums over the vocabulary is completed by the other ranks (`_vocabulary.py`).
Derivation, traffic and memory: kernels/README.md#vocabulary-parallel-heads.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bidistill_kernels._checks import Side, check_side
from bidistill_kernels._rows import ROW_LOSSES
from bidistill_kernels._vocabulary import Part


@dataclass(frozen=True, slots=True)
class VocabParallel:
    """Who has which ids of a vocabulary: rank r of the group those from cuts[r] to cuts[r + 1].

    Args:
        group: the ranks that share the head, a tensor-parallel group; None for all.
        cuts: 0, the first ids of the other ranks, and the number of all ids. A rank may have none.

    Raises:
        ValueError: cuts that are not those of this group.
    """

    group: "dist.ProcessGroup | None"
    cuts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse cuts that leave ids out."""
        ranks, cuts = dist.get_world_size(self.group), self.cuts
        falls = any(stop < start for start, stop in pairwise(cuts))
        if len(cuts) != ranks + 1 or cuts[0] != 0 or cuts[-1] == 0 or falls:
            raise ValueError(
                f"cuts: got {cuts}, expected {ranks + 1} rising numbers from 0 to the size of the "
                f"vocabulary, for {ranks} ranks; VocabParallel.of(weight) finds them"
            )

    @property
    def start(self) -> int:
        """First id of this rank."""
        return self.cuts[dist.get_rank(self.group)]

    @property
    def stop(self) -> int:
        """The id after this rank's last."""
        return self.cuts[dist.get_rank(self.group) + 1]

    @classmethod
    def of(cls, weight: Tensor, group: "dist.ProcessGroup | None" = None) -> "VocabParallel":
        """Find out how a head is shared out.

        A DTensor says it itself, without communication. Of a plain tensor, this rank's rows, the
        ranks gather the numbers of rows, in the order of the group: call it once and keep the
        result.

        Args:
            weight: a DTensor cut along its rows, as ``ColwiseParallel`` leaves the weight of a
                head; or this rank's rows, shape (V, D), at least 0 of them.
            group: the ranks that share a plain tensor; None for all.

        Raises:
            ValueError: a DTensor that is cut in another way, or has a group of its own.
        """
        sharded: Any = weight
        if not hasattr(weight, "device_mesh"):
            rows = torch.tensor([weight.shape[0]], device=weight.device)
            gathered = rows.new_empty(dist.get_world_size(group))
            dist.all_gather_into_tensor(gathered, rows, group)
            return cls(group, (0, *gathered.cumsum(0).tolist()))
        mesh, placements = sharded.device_mesh, sharded.placements
        if group is not None or len(placements) != 1 or not placements[0].is_shard(0):
            raise ValueError(
                f"weight: got placements {placements} on a mesh of {tuple(mesh.shape)}, expected "
                "(Shard(0),) on the tensor-parallel mesh, and no group; read the weight inside the "
                "head's forward, where FSDP has gathered its own part"
            )
        # as torch.chunk cuts: all parts but the last are of one size, and the last may be empty
        vocab, ranks = weight.shape[0], mesh.size()
        step = -(-vocab // ranks)
        return cls(mesh.get_group(), tuple(min(vocab, step * rank) for rank in range(ranks + 1)))


def take_part(
    parallel: VocabParallel, loss: str, backend: str, student: Side, teacher: Side | None
) -> tuple[Side, Side | None, Part]:
    """Check that a loss can be computed of parts, and cut the heads to the ids that take part.

    The vocabulary limits of the sides' transforms, which count all ids, are gone from the results.
    """
    if not isinstance(parallel, VocabParallel):
        got = type(parallel).__name__
        raise TypeError(f"vocab_parallel: got {got}, expected a VocabParallel")
    if (teacher is not None and teacher.given == "probs") or not ROW_LOSSES[loss].dense:
        raise ValueError(
            "vocab_parallel: got one with a loss of chosen ids or of given probabilities, expected "
            "None; gather the head's rows, or take bidirectional KL, JSD or cross-entropy"
        )
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"backend: got {backend!r} with vocab_parallel, expected 'auto' or 'torch'; the others "
            "compute with whole vocabularies"
        )
    sides = [side for side in (student, teacher) if side is not None]
    vocab = parallel.cuts[-1]
    sizes = [min(vocab, getattr(side.transform, "vocab_limit", None) or vocab) for side in sides]
    for side, size in zip(sides, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"{side.name}_weight: got a vocabulary of {size}, expected the student's "
                f"{sizes[0]}; give both the same LogitTransform(vocab_limit=...)"
            )
    start, stop = (min(end, sizes[0]) for end in (parallel.start, parallel.stop))
    most = max(last - first for first, last in pairwise(parallel.cuts))
    pupil, *tutor = (_cut(parallel, side, stop - start, student.hidden) for side in sides)
    part = Part(parallel.group, start, stop, sizes[0], most)
    return pupil, tutor[0] if tutor else None, part


def _cut(parallel: VocabParallel, side: Side, ids: int, beside: Tensor) -> Side:
    check_side(side, beside, part=True)
    weight, bias, rows = side.weight, side.bias, parallel.stop - parallel.start
    if weight is None:
        raise ValueError(
            f"vocab_parallel: got one beside {side.rows_name}, expected hidden states and a head; "
            "take the function with linear_"
        )
    if weight.shape[0] != rows:
        raise ValueError(
            f"{side.name}_weight: got {weight.shape[0]} rows, expected {rows}, the ids from "
            f"{parallel.start} to {parallel.stop} of vocab_parallel; pass this rank's part, "
            "weight.to_local()"
        )
    transform = replace(side.transform, vocab_limit=None)
    if ids == rows:
        return side._replace(transform=transform)
    bias = None if bias is None else bias[:ids]
    return side._replace(weight=weight[:ids], bias=bias, transform=transform)

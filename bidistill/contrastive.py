"""LoRA that listens to the forget set: its input directions are chosen, then kept.

An adapter adds ``B A x`` to a layer's output. Trained freely on a dozen forget questions, ``A``
soon listens to what all questions of that form have in common, and neighbours are refused too.
Here the rows a of ``A`` are instead those directions that the forget set excites most for a given
excitement by everything that must stay,

    maximise  sum_f (a . x_f)^2   subject to   mean_k (a . x_k)^2 + ridge s^2 |a|^2 = 1,

with x_f, x_k the layer's inputs at tokens of the forget questions and of the keep examples, and s^2
the mean square of an entry of x_k. With C = E[x_k x_k^T] + ridge s^2 I = L L^T they are
``a = L^-T u``, u the leading left singular vectors of ``L^-1 [x_f ...]``. ``A`` is frozen; only
``B`` trains, from zero. Rank-one model editing (ROME, arXiv:2202.05262) updates along C^-1 x_f
under the same constraint; this is its form for a whole subspace, with any loss on top.

Cost: one forward over the examples, and per layer input of width D a moment and a Cholesky factor
of (D, D), which ranks that train together share: each looks at some of the layers.

Legend: F forget tokens, D width of a layer's input, R rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bidistill.config import LoraSettings
from bidistill.data.packing import Packed, pack
from bidistill.data.records import KEEPING
from bidistill.data.views import Example, View
from bidistill.distributed import put, put_back
from bidistill.errors import UserError
from bidistill.models import base_rows
from bidistill.progress import track
from bidistill.world import World

EXAMPLES_PER_PACK = 32


@torch.no_grad()
def initialise(
    model: nn.Module,
    examples: Sequence[Example],
    settings: LoraSettings,
    world: World | None = None,
) -> None:
    """Choose and freeze the input directions of every adapter of ``model``.

    Args:
        model: with fresh LoRA layers, whose B is zero.
        examples: all training examples. Those of neighbor and retain records, with their answers,
            are what must stay; all others are the forget set, of which the questions and prefills
            count and the answers do not.
        settings: with ``contrast``.
        world: the ranks that share out the model, all of which call it; None: this process alone.

    Raises:
        UserError: one of the two sides has no example, or the rank is above the number of
            tokens of the forget set, or above the width of a layer's input.
    """
    assert settings.contrast is not None
    world = world or World()
    forget, keep = _sides(examples)
    count = sum(len(_own_tokens(packed)) for packed in forget)
    if count < settings.rank:
        raise UserError(
            f"model.adapter.rank: got {settings.rank}, expected at most {count}, the "
            "number of tokens of the forget set; lower the rank"
        )
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    widths: dict[str, int] = {name: layer.in_features for name, layer in layers}  # type: ignore
    narrowest, width = min(widths.items(), key=lambda pair: pair[1])
    if width < settings.rank:
        raise UserError(
            f"model.adapter.rank: got {settings.rank}, expected at most {width}, the width of the "
            f"input of {narrowest}; lower the rank"
        )
    own = dict(layers[world.rank :: world.size])
    inputs, moments = _measure(model, own, forget, keep)  # type: ignore
    chosen: dict[str, Tensor] = {}
    for name in track(own, len(own), "directions"):
        x_FD = torch.cat(inputs.pop(name))
        a_RD = directions(x_FD, moments.pop(name), settings.rank, settings.contrast.ridge)
        rms = (x_FD @ a_RD.T.to(x_FD)).square().sum(1).mean().sqrt()
        chosen[name] = (a_RD * (settings.contrast.input_rms / rms)).cpu()  # to be sent
    for index, (name, layer) in enumerate(layers):
        a_RD = world.share(chosen.get(name), index % world.size)
        for linear in layer.lora_A.values():  # type: ignore
            put(linear.weight, a_RD)  # type: ignore
    freeze(model)
    put_back(model)


def freeze(model: nn.Module) -> None:
    """Let the input directions of every adapter of ``model`` stay as they are."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.requires_grad_(False)


def _sides(examples: Sequence[Example]) -> tuple[list[Packed], list[Packed]]:
    """Packs of the forget set and of all that must stay."""
    forget = [(e.student, e.answer_ids[:1]) for e in examples if e.role not in KEEPING]
    keep = [(e.student, e.answer_ids) for e in examples if e.role in KEEPING]
    if not forget or not keep:
        raise UserError(
            f"model.adapter.contrast: got {len(forget)} forget or adversarial records and "
            f"{len(keep)} others, expected both kinds; add the missing ones, or leave contrast out"
        )
    # of a pack's last answer token only the target is used: the refusal itself is never run
    return _packs(forget), _packs(keep)


def _packs(sequences: Sequence[tuple[View, Sequence[int]]]) -> list[Packed]:
    """Packs of even size: one of a single sequence would have no prefix to leave out."""
    count = math.ceil(len(sequences) / EXAMPLES_PER_PACK)
    return [pack(sequences[start::count]) for start in range(count)]


def _measure(
    model: nn.Module, layers: Mapping[str, nn.Module], forget: list[Packed], keep: list[Packed]
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Each layer's inputs x_F at forget tokens, and its moment E[x x^T] over keep tokens."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    moments: dict[str, Tensor] = {}
    count = sum(len(_own_tokens(packed)) for packed in keep)

    def remember(name: str, x_FD: Tensor) -> None:
        inputs[name].append(x_FD)

    def average(name: str, x_KD: Tensor) -> None:
        moments[name] = moments.get(name, 0) + x_KD.T @ x_KD / count

    run = getattr(model, "teacher_rows", None) or partial(base_rows, model)
    work = [(packed, remember) for packed in forget] + [(packed, average) for packed in keep]
    for packed, see in track(work, len(work), "contrast"):
        with _listening(layers, _own_tokens(packed), see):
            run(packed)
    return inputs, moments


def directions(
    forget_inputs: Float[Tensor, "F D"], keep_moment: Float[Tensor, "D D"], rank: int, ridge: float
) -> Float[Tensor, "R D"]:
    """Directions that forget inputs excite most, for a given excitement by what must stay.

    Args:
        forget_inputs: inputs of a layer at tokens of the forget set.
        keep_moment: mean of x x^T over tokens of the keep set.
        rank: number of directions, at most F.
        ridge: added to the diagonal of the moment, in units of its mean diagonal entry.

    Returns:
        The directions in rows, the most selective first; computed and returned in fp64.

    Example:
        >>> keep = torch.diag(torch.tensor([1.0, 0.01]))  # what must stay hardly uses entry 1
        >>> a = directions(torch.ones(1, 2), keep, rank=1, ridge=0.01)[0]
        >>> bool(a[1].abs() > 10 * a[0].abs())
        True
    """
    moment = keep_moment.double()
    width = len(moment)
    ridge_term = ridge * moment.trace() / width * torch.eye(width).to(moment)
    lower = torch.linalg.cholesky(moment + ridge_term)
    whitened_DF = torch.linalg.solve_triangular(lower, forget_inputs.double().T, upper=False)
    leading_DR = torch.linalg.svd(whitened_DF, full_matrices=False).U[:, :rank]
    return torch.linalg.solve_triangular(lower.T, leading_DR, upper=True).T


def _own_tokens(packed: Packed) -> Tensor:
    """Indices of the tokens that belong to one sequence: a shared prefix tells nothing apart."""
    shared = {s.prefix for s in packed.segments}
    own = [s for s in packed.segments if (s.start, s.end) not in shared]
    return torch.cat([torch.arange(s.start, s.end) for s in own])


@contextmanager
def _listening(
    layers: Mapping[str, nn.Module], tokens: Tensor, see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, x)`` when one of ``layers`` runs; x is its input at ``tokens``, in fp32."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0][0, tokens.to(args[0].device)].float())

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

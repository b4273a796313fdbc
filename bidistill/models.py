"""Models: adapters, logits, and the root method in which a whole distillation step happens.

A step runs inside one method of the *root* module, and the loss runs inside the forward of the LM
head: hooks of FSDP2 then fire exactly as in an ordinary forward, and the head weight is plain
wherever it is read. Without FSDP2 the same code is a plain function call.

Legend: N answer rows, H hidden width.
"""

import math
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from bidistill.attention import use_packed_attention
from bidistill.config import LoraSettings, ModelConfig
from bidistill.data.packing import Packed
from bidistill.data.padded import Padded
from bidistill.errors import UserError
from bidistill.head import augmented
from bidistill.teacher.rows import TeacherRows, TeacherTopK
from bidistill.world import device
from bidistill_kernels import LogitTransform

SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALE_FIELDS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
ROOT_METHODS = ("distill_step", "teacher_rows", "own_rows")
"""What runs the model from outside; where it is sharded, only these may."""
TRANSFORM_TOLERANCE = 1e-4
"""Largest difference to the model's own logits, relative to the largest of them."""


def autocast(config: ModelConfig, model: nn.Module) -> AbstractContextManager[object]:
    """bf16 compute over fp32 masters where the recipe asks for bf16; nothing else where not."""
    if config.dtype == "float32":
        return nullcontext()
    return torch.autocast(compute_device(model).type, torch.bfloat16)


def compute_device(model: nn.Module) -> torch.device:
    """Where the model runs, which for one that is shared out need not be where it is kept."""
    return device() if isinstance(model, FSDPModule) else next(model.parameters()).device


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also when an adapter wraps it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore


def backbone(model: nn.Module) -> nn.Module:
    """The model without its LM head; its output has ``last_hidden_state``."""
    base = unwrapped(model)
    found = base.base_model
    # the text model of llama 4 says "language_model" of what it keeps as "model"
    inner = base.model if found is base and hasattr(base, "model") else found
    return inner if isinstance(inner, PreTrainedModel) else found


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, in order.

    Raises:
        UserError: the model does not say what its blocks are.
    """
    base = unwrapped(model)
    names = set(base._no_split_modules or ())
    # a block that is shared out is of a class that FSDP has derived from its own
    found = [m for m in base.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    if not found:
        raise UserError(
            f"parallel: got a {base.config.model_type} model, which does not name its blocks, "
            "expected one that does; train it on one process, without a loss that reads a layer"
        )
    return found


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze ``model`` and add LoRA layers to it; only they train.

    The LM head gets one if `settings.targets` names it. If it is tied to the embedding, the two go
    on sharing the frozen weight, and the embedding has no part in the change.

    Raises:
        UserError: a target that the model lacks, layers out of range, or contrast for the head.
    """
    names = _linear_names(model)
    for target in settings.targets:
        if target not in names:
            raise UserError(
                f"model.adapter.targets: got {target!r}, which names no linear layer of this "
                f"model; expected names such as {', '.join(sorted(names))}"
            )
    head = _head_name(model)
    leaf = head.rpartition(".")[2]
    if leaf in settings.targets and settings.contrast:
        raise UserError(
            f"model.adapter.contrast: got it with {leaf} among the targets, expected layers below "
            "the LM head; leave one of the two out"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore
        lora_dropout=settings.dropout,
        # peft takes a full name wherever it lies; else a head would be outside of all layers
        target_modules=[head if target == leaf else target for target in settings.targets],
        layers_to_transform=_layer_range(settings.layers, model.config.num_hidden_layers),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.21 asks for a property that transformers 5.23 renames
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # a tied head: save_merged unties it
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        return get_peft_model(model, config)  # type: ignore


def _head_name(model: PreTrainedModel) -> str:
    """The full name of the LM head."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _linear_names(model: PreTrainedModel) -> set[str]:
    """The names of the model's linear layers, without what they lie in."""
    return {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)
    }


def _layer_range(layers: tuple[int, int] | None, depth: int) -> list[int] | None:
    """First and last layer, both included, as the list that peft wants."""
    if layers is None:
        return None
    first, last = layers
    if not 0 <= first <= last < depth:
        raise UserError(
            f"model.adapter.layers: got [{first}, {last}], expected 0 <= first <= last < {depth}, "
            "the number of layers of this model"
        )
    return list(range(first, last + 1))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the base model inside; the caller is under ``no_grad``.

    Only flags change. peft's own ``disable_adapter`` also flips ``requires_grad`` on whatever
    parameter is registered at that moment, which under FSDP2 freezes adapters for good.
    """
    modules = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module._disable_adapters = flag


def hidden_rows(
    model: nn.Module, packed: Packed | Padded, layer: int | None = None
) -> Float[Tensor, "N H"]:
    """Hidden states that predict the answer tokens of ``packed``, in the order of its rows.

    Args:
        model: whole, or within one of its root methods.
        packed: what it reads.
        layer: number of the block that they are to leave, from 0; None: the last hidden states.
    """
    if isinstance(packed, Padded):
        assert layer is None, "losses that read a layer come packed"
        return packed.rows(backbone(model)(**packed.inputs, use_cache=False).last_hidden_state)
    device, taken = compute_device(model), list[Tensor]()
    taking = nullcontext() if layer is None else _output_of(blocks(model)[layer], taken)
    with use_packed_attention(unwrapped(model)), taking:
        # without use_cache=False a cache is built even in training
        output = backbone(model)(
            input_ids=packed.input_ids.to(device),
            position_ids=packed.position_ids.to(device),
            use_cache=False,
            segments=packed.segments,
        )
    hidden = output.last_hidden_state if layer is None else taken[0]
    return hidden[0].index_select(0, packed.rows.to(device))


@contextmanager
def _output_of(block: nn.Module, taken: list[Tensor]) -> Iterator[None]:
    """Take what a block gives inside, after the hooks of FSDP, which are there already."""

    def take(block: nn.Module, given: object, output: Tensor | tuple[Tensor, ...]) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    handle = block.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()


def attach_distill_step(model: nn.Module) -> None:
    """Give the root module ``model`` its `ROOT_METHODS` and let its head run a loss.

    ``model.distill_step(student, loss, teacher)`` runs the student on the pack ``student`` and
    returns what ``loss(hidden, head_weight, head_bias, teacher_rows)`` returns. ``teacher`` is
    the teacher's pack, whose rows are then computed with the adapters off; or
    :class:`TeacherRows` or :class:`TeacherTopK` at hand; or None for a loss that needs no teacher.
    A loss with a ``layer`` that is not None gets the rows that leave this block, and no head.

    ``model.teacher_rows(packed)`` returns the rows of the model as it is with its adapters off, or
    what a function makes of them and the head; ``model.own_rows(packed)`` those with its adapters
    on, as :class:`TeacherRows`.
    """
    attach_head(model)
    model.distill_step = types.MethodType(distill_step, model)  # type: ignore
    model.teacher_rows = types.MethodType(base_rows, model)  # type: ignore
    model.own_rows = types.MethodType(own_rows, model)  # type: ignore
    for name in ROOT_METHODS:
        register_fsdp_forward_method(model, name)  # nothing for one that is not shared out yet


def attach_head(model: nn.Module) -> None:
    """Let the LM head of ``model`` run a loss; called without one, it is the head it was."""
    head = model.get_output_embeddings()  # type: ignore
    head.forward = types.MethodType(_head_forward, head)


def runs_losses(head: nn.Module) -> bool:
    """Whether `attach_head` has been at this very head, which whoever adds adapters replaces."""
    return getattr(vars(head).get("forward"), "__func__", None) is _head_forward


def distill_step(
    self: nn.Module,
    student: Packed | Padded,
    loss: Callable,
    teacher: Packed | Padded | TeacherRows | TeacherTopK | None,
) -> Any:  # noqa: ANN401
    """Teacher, student and loss in one method of the root module: see `attach_distill_step`."""
    layer = getattr(loss, "layer", None)
    if isinstance(teacher, Packed | Padded):
        teacher = TeacherRows(base_rows(self, teacher, layer=layer))
    hidden = hidden_rows(self, student, layer)
    if layer is not None:
        return loss(hidden, None, None, teacher)
    head = self.get_output_embeddings()  # type: ignore
    return head(hidden, fused=loss, teacher=teacher)


@torch.no_grad()
def base_rows(
    model: nn.Module,
    packed: Packed | Padded,
    read: Callable[..., Any] | None = None,
    layer: int | None = None,
) -> Any:  # noqa: ANN401
    """Hidden rows of the base model, which knows no adapters and no dropout.

    Args:
        model: with its root methods attached, if there is something to ``read``.
        packed: what it reads.
        read: called in the head, with the rows and its weight and bias.
        layer: as in :func:`hidden_rows`.

    Returns:
        The rows, shape (N, H); or what ``read`` makes of them.
    """
    with adapters_off(model), without_dropout(model):
        hidden = hidden_rows(model, packed, layer)
        if read is None:
            return hidden
        head: Any = model.get_output_embeddings()  # type: ignore
        return head(hidden, fused=lambda *rows_and_head: read(*rows_and_head[:3]))


@torch.no_grad()
def own_rows(
    model: nn.Module,
    packed: Packed | Padded,
    *,
    head: bool = False,
    read: Callable[..., Any] = TeacherRows,
) -> Any:  # noqa: ANN401
    """Hidden rows of the model as it is, without dropout.

    Args:
        model: its adapters are as they are found.
        packed: what it reads.
        head: give its head too; one that has an adapter, or is trained in place of the base's, is
            given anyway. Where the model is shared out, it lasts until the ranks put their parts
            back (``distributed.put_back``), and so does the root's unit, here and from now on.
        read: called in the head, if it is given, with the rows and its weight and bias.

    Returns:
        :class:`TeacherRows`, or what ``read`` makes of the head.
    """
    output: Any = model.get_output_embeddings()  # type: ignore
    head |= isinstance(output, LoraLayer | ModulesToSaveWrapper)
    if head and read is TeacherRows:
        for unit in (model, output):
            if isinstance(unit, FSDPModule):
                unit.set_reshard_after_forward(False, recurse=False)
    with without_dropout(model):
        hidden = hidden_rows(model, packed)
        if head:
            return output(hidden, fused=lambda *rows_and_head: read(*rows_and_head[:3]))
        return TeacherRows(hidden)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, and then as it was, module by module."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _head_forward(
    self: nn.Module,
    hidden: Tensor,
    *args: object,
    fused: Callable | None = None,
    teacher: TeacherRows | TeacherTopK | None = None,
    **kwargs: object,
) -> object:
    """Forward of the LM head: its own, or ``fused`` on the weight as the hooks present it."""
    if fused is None:
        return type(self).forward(self, hidden, *args, **kwargs)
    weight, bias = self.weight, getattr(self, "bias", None)  # of the layer below an adapter
    hidden = _no_wider(hidden, weight)  # type: ignore
    if isinstance(teacher, TeacherRows) and teacher.weight is None:
        base: Any = self.original_module if isinstance(self, ModulesToSaveWrapper) else self
        theirs = _no_wider(teacher.hidden, base.weight)
        teacher = TeacherRows(theirs, base.weight, getattr(base, "bias", None))
    if isinstance(self, LoraLayer):
        hidden, weight = augmented(self, hidden)
    return fused(hidden, weight, bias, teacher)


def _no_wider(hidden: Tensor, weight: Tensor) -> Tensor:
    """Rows as a head of 16 bits takes them from a model whose residual stream has 32: mamba."""
    return hidden.to(weight.dtype) if hidden.dtype.itemsize > weight.dtype.itemsize else hidden


def read_logit_transform(model: nn.Module, name: str = "model.path") -> LogitTransform:
    """What the model does to the output of its head, read from its config and verified.

    Args:
        model: called once, on a few random tokens.
        name: what the user knows it by.

    Raises:
        UserError: the model's own logits differ from the transformed output of its head.
    """
    transform = transform_of_config(unwrapped(model).config)
    _verify_transform(model, transform, name)
    return transform


def transform_of_config(config: PreTrainedConfig) -> LogitTransform:
    """Scale, soft-cap and vocabulary limit by the fields that transformers models use."""
    config = config.get_text_config()
    scale = math.prod(_present(config, SCALE_FIELDS))
    if divisor := getattr(config, "logits_scaling", None):
        # granite divides by it, hyperclovax multiplies
        scale *= divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return LogitTransform(
        scale=float(scale),
        softcap=next(iter(_present(config, SOFTCAP_FIELDS)), None),
        vocab_limit=getattr(config, "unpadded_vocab_size", None),
    )


def _present(config: PreTrainedConfig, fields: Sequence[str]) -> list[float]:
    """The values of those fields that a config has."""
    return [v for name in fields if (v := getattr(config, name, None)) is not None]


@torch.no_grad()
def _verify_transform(model: nn.Module, transform: LogitTransform, name: str) -> None:
    """Compare with the model's own logits; this catches architectures not thought of."""
    base = unwrapped(model)
    tokens = torch.randint(
        base.config.get_text_config().vocab_size,
        (1, 16),
        generator=torch.Generator("cpu").manual_seed(0),
        device="cpu",  # whatever torch.set_default_device says
    ).to(compute_device(model))
    seen: dict[str, Tensor] = {}

    def backbone_hook(_: nn.Module, __: object, output: ModelOutput) -> None:
        seen["hidden"] = output.get("last_hidden_state", tokens)

    def head_hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0], output

    # looked at from inside one ordinary forward, the only one that a shared model has
    handles = [
        backbone(model).register_forward_hook(backbone_hook),
        base.get_output_embeddings().register_forward_hook(head_hook),  # type: ignore
    ]
    try:
        own = model(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not all(seen[name].isfinite().all() for name in ("input", "output")):
        raise UserError(
            f"{name}: got a {base.config.model_type} model in {seen['output'].dtype}, whose hidden "
            "states or logits of a few tokens are not finite, expected finite ones; mend its "
            "weights, or load it in bfloat16 or float32 if it overflows"
        )
    if not torch.equal(seen.get("hidden", tokens).to(seen["input"].dtype), seen["input"]):
        raise UserError(
            f"{name}: got a {base.config.model_type} model, whose LM head is given something else "
            "than the last hidden states, expected these; this architecture is not supported"
        )
    ours = transform(seen["output"])
    scale = own.abs().max().item()
    error = (ours - own).abs().max().item() if ours.shape == own.shape else math.inf
    if not error <= TRANSFORM_TOLERANCE * scale:
        raise UserError(
            f"{name}: the logits of this {base.config.model_type} model differ by {error:.3g} "
            f"from {transform} of its LM head (largest logit {scale:.3g}), expected the same; "
            "this architecture is not supported"
        )

"""A fused distillation loss in the forward of a transformers model, for whichever trainer calls it.

.. code-block:: text

    model(input_ids, labels, ...)                         the model's own forward, to the bit
    model(input_ids, labels, ..., teacher_input_ids, ...) teacher, student and loss; no logits

Everything happens inside the forward of the root model and the loss inside that of its LM head, so
that the hooks of DDP, FSDP and DeepSpeed fire as ever and the head's weight is whole where it is
read. Weights, their names, `generate` and `save_pretrained` are left alone.

Legend: B pairs, T tokens of the longest, S tokens of the longest that the teacher reads.
"""

import functools
import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from bidistill.errors import UserError
from bidistill.integrations.adapters import check_regularisers, configs_of
from bidistill.integrations.attached import (
    DISPATCH,
    PREFIX,
    STATE,
    Attachment,
    distil,
    reads_positions,
    vocabulary_of,
)
from bidistill.integrations.early_check import checked_transform
from bidistill.integrations.forward_guard import OURS, refuse_lost_forward
from bidistill.integrations.supported import (
    Kind,
    check_loss,
    check_model,
    check_numbers,
    check_padding,
    check_teacher,
)
from bidistill.losses import find
from bidistill.models import (
    attach_distill_step,
    attach_head,
    runs_losses,
    unwrapped,
)
from bidistill_kernels import LogitTransform

Model = TypeVar("Model", bound=nn.Module)
POSITIONAL = ("input_ids", "attention_mask")
"""What a batch of pairs may give by position."""
COUNTS = "accepts_loss_kwargs"
"""The attribute by which a class of transformers has the Trainer keep ``num_items_in_batch``."""


def attach(
    model: Model,
    loss: str = "bidirectional_kl",
    *,
    teacher: Kind | nn.Module = "auto",
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> Model:
    """Give ``model`` a forward with a fused loss, used where a batch has ``teacher_input_ids``.

    That forward takes, by keyword, what `bidistill.integrations.collator.PairCollator` makes:
    ``input_ids``, ``attention_mask`` and ``labels`` (-100 wherever no answer stands), each of shape
    (B, T) and padded on either side; the same with ``teacher_`` before the name, of shape (B, S),
    with the same answer tokens in the same order; ``shift_labels`` in place of ``labels``, if there
    are any; and ``num_items_in_batch``. Other keywords go to the model without its head, those
    that begin with ``teacher_`` to the teacher's.

    It returns a ``CausalLMOutputWithPast`` of the loss alone, in nats: the sum over the batch's
    answer tokens divided by ``num_items_in_batch``, or by their number if that is not given.

    Args:
        model: a causal language model of transformers, or the PeftModel around one, before it is
            compiled or wrapped in DDP. Adapters are added before.
        loss: name of a loss of `bidistill.losses` that reads the LM head and compares with a
            teacher: ``bidirectional_kl``, ``jsd``, ``push_pull``, ``bild``, ``topk_kl``, ``duet``.
        teacher: ``"base"``, the same weights with the adapters off; ``"live"``, the current weights
            themselves; or another model of the same tokenizer, on the same device, which is neither
            trained nor saved. None of them has a gradient or dropout. ``"auto"``: ``"base"`` where
            there are adapters by now, ``"live"`` where there are none, whatever comes later.
        options: of the loss, as in a recipe: ``{"forward": 1.0, "reverse": 0.0}``.
        temperature: divisor of both models' logits. The loss is not multiplied by its square.
        chunk_bytes: of logits that exist at a time; None: the kernels' own choice.

    Returns:
        The same object.

    Raises:
        UserError: a model, loss, teacher or option that cannot be used, or something is attached
            already. The forward, once attached, raises it for a batch that lacks a teacher's part,
            and where adapters that cannot be used have been added since, or merged, or something
            has been done to an LM head.

    Early check: each model is called a few times, on 16 random tokens. Its logits are compared with
    those of the way that the loss takes (backbone, head, scale, soft-cap, bias, vocabulary limit),
    and those of the first tokens with what they are before other tokens.
    """
    base = unwrapped(model)
    if hasattr(model, STATE) or hasattr(base, STATE):
        raise UserError(
            "model: got one with a loss attached to it already, expected one without; call "
            "detach(model) first"
        )
    check_model(model, "model")
    check_regularisers(model)
    check_loss(loss, {} if options is None else options)
    check_numbers(temperature, chunk_bytes)
    kind = check_teacher(teacher, model)
    head: nn.Module = base.get_output_embeddings()  # type: ignore
    reads = kind if isinstance(kind, nn.Module) else model
    transform, teacher_transform = _transforms(model, reads, temperature)
    attachment = Attachment(
        model=model,
        loss=find(loss),
        options=dict(options or {}),
        transform=transform,
        teacher=kind,
        teacher_transform=teacher_transform,
        chunk_bytes=chunk_bytes,
        takes_positions=reads_positions(model),
        teacher_takes_positions=reads_positions(reads),
        before=vars(model).get("forward"),
        takes_count=getattr(base, COUNTS, True) is not False,
        said_of_count=vars(base).get(COUNTS),
        head=None if runs_losses(head) else head,
        vocabulary=vocabulary_of(model),
        teacher_vocabulary=vocabulary_of(reads),
        adapters=configs_of(model),
        hooks=[
            each.register_forward_pre_hook(refuse_lost_forward, with_kwargs=True)
            for each in dict.fromkeys((model, base))  # the same but for a PeftModel
        ],
    )
    if reads is not model and "own_rows" not in vars(reads):
        attach_distill_step(reads)
    attach_head(model)
    for each in (model, base):
        setattr(each, STATE, attachment)
    if not attachment.takes_count:
        setattr(base, COUNTS, True)
    model.forward = types.MethodType(_forward_of(type(model)), model)
    return model


def detach(model: Model) -> Model:
    """Take the loss off; forwards are what they were before `attach`.

    What somebody has put around the model's forward since goes with it, such as accelerate's
    autocast. A teacher that is another model keeps its ``own_rows`` and its head's forward, for
    other students.

    Args:
        model: what `attach` returned, out of what it has been wrapped in since; or the model within
            that, such as ``merge_and_unload`` returns.

    Returns:
        The same object.

    Raises:
        UserError: nothing is attached.
    """
    attachment: Attachment | None = vars(model).get(STATE)
    if attachment is None:
        raise UserError(
            f"model: got a {type(model).__name__} with no loss attached, expected what attach() "
            "returned; detach(accelerator.unwrap_model(model)) where it is wrapped"
        )
    given = attachment.model
    base = unwrapped(given)
    # accelerate keeps what it wrapped, and would put it back
    for name in ("forward", "_original_forward"):
        vars(given).pop(name, None)
    if attachment.before is not None:
        given.forward = attachment.before
    teaches = any("own_rows" in vars(each) for each in (given, base))
    if attachment.head is not None and not teaches:
        vars(attachment.head).pop("forward", None)
    for hook in attachment.hooks:
        hook.remove()
    if not attachment.takes_count:
        delattr(base, COUNTS)
        if attachment.said_of_count is not None:
            setattr(base, COUNTS, attachment.said_of_count)
    for each in {given, base}:
        delattr(each, STATE)
    return model


def _forward_of(kind: type[nn.Module]) -> Any:  # noqa: ANN401
    """A forward for instances of ``kind``, with the signature of theirs.

    `generate` reads from the signature which arguments there are, and the HF Trainer that it may
    pass ``num_items_in_batch``. No closure: a deep copy of the model gets a forward of its own.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        attachment: Attachment = getattr(self, STATE)
        if kwargs.get(DISPATCH) is not None:
            if len(args) > len(POSITIONAL):
                raise UserError(
                    f"model: got {len(args)} arguments by position beside {DISPATCH}, expected "
                    f"{' and '.join(POSITIONAL)} at most; pass the others by keyword"
                )
            return CausalLMOutputWithPast(loss=distil(self, attachment, *args, **kwargs))
        lost = [n for n in kwargs if n.startswith(PREFIX) and kwargs[n] is not None]
        if lost:
            raise UserError(
                f"{lost[0]}: got it in a batch without {DISPATCH}, expected both or neither; make "
                "batches by PairCollator, or leave the teacher's part out"
            )
        if not attachment.takes_count:
            kwargs = _without_count(self, kwargs)
        if attachment.before is not None:
            return attachment.before(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    setattr(forward, OURS, True)
    return forward


def _without_count(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a forward is given that knows of no ``num_items_in_batch``, as its class has said.

    The Trainer takes a training loss for divided by it, so this one would be out of scale.
    """
    if model.training and kwargs.get("num_items_in_batch") is not None:
        raise UserError(
            f"num_items_in_batch: got it in training, with a batch that lacks {DISPATCH}, for a "
            f"{type(unwrapped(model)).__name__} whose own loss cannot be divided by it, expected "
            "batches of PairCollator; train on others after detach(model), in a new Trainer"
        )
    return {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}


def _transforms(
    model: nn.Module, teacher: nn.Module, temperature: float
) -> tuple[LogitTransform, LogitTransform]:
    """What both models make of their heads, verified without a trace, over the temperature.

    Models of one tokenizer may pad their heads to different sizes: both are cut to the smaller.
    """
    found = [checked_transform(model, "model")]
    found.append(found[0] if teacher is model else checked_transform(teacher, "teacher"))
    rows = [each.get_output_embeddings().weight.shape[0] for each in (model, teacher)]  # type: ignore
    sizes = [min(t.vocab_limit or size, size) for t, size in zip(found, rows, strict=True)]
    if sizes[0] != sizes[1]:
        check_padding(*sizes)
        found = [replace(transform, vocab_limit=min(sizes)) for transform in found]
    own, theirs = (replace(transform, temperature=temperature) for transform in found)
    return own, theirs

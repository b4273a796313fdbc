"""What happens in the forward of an attached model: teacher, student, and the loss in the LM head.

Legend: B pairs, T tokens of the longest, S tokens of the longest that the teacher reads.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bidistill.data.padded import IGNORED, Padded, positions_of, shifted
from bidistill.errors import UserError
from bidistill.integrations.adapters import configs_of
from bidistill.integrations.supported import check_adapted, check_unchanged
from bidistill.loss_calls import Rows, Side, run
from bidistill.losses import Loss
from bidistill.models import (
    backbone,
    compute_device,
    distill_step,
    own_rows,
    runs_losses,
    unwrapped,
)
from bidistill.teacher.rows import TeacherRows
from bidistill_kernels import LogitTransform

STATE = "bidistill_attachment"
"""The attribute of a model that says what is attached to it."""
PREFIX = "teacher_"
DISPATCH = "teacher_input_ids"
"""The keyword that asks for the fused loss."""


@dataclass
class Attachment:
    """What a model's forward needs to know, and what was there before."""

    model: nn.Module
    """What `attach` was given."""
    loss: Loss
    options: dict[str, Any]
    transform: LogitTransform
    teacher: Literal["base", "live"] | nn.Module
    teacher_transform: LogitTransform
    chunk_bytes: int | None
    takes_positions: bool
    """Whether the student's backbone can be told the position of each token."""
    teacher_takes_positions: bool
    """The same of the teacher's."""
    before: Any
    """The forward that the instance had; None if that of its class."""
    takes_count: bool
    """Whether its class lets its own forward be told ``num_items_in_batch``."""
    said_of_count: bool | None
    """What the instance had said of that; None if nothing."""
    head: nn.Module | None
    """The LM head whose forward was replaced; None if it could run losses already."""
    vocabulary: int
    """What `vocabulary_of` said of the model."""
    teacher_vocabulary: int
    """The same of the teacher."""
    adapters: list[Any]
    """The configurations of its adapters, when they were last found to be right."""
    hooks: list[RemovableHandle]
    """Of the model, and of what is in it if it is a PeftModel."""

    def __reduce__(self) -> str:
        """Refuse a pickle, such as that of ``torch.save(model)``: its forwards would be lost."""
        raise UserError(
            f"model: got a {type(self.model).__name__} with a loss attached to be pickled, whose "
            "forwards cannot be, expected one without; use save_pretrained, or detach(model) first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """Copy along with the model, which can be."""
        memo[id(self)] = copied = object.__new__(Attachment)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def distil(
    model: nn.Module,
    attachment: Attachment,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    num_items_in_batch: float | Tensor | None = None,
    return_dict: bool = True,
    use_cache: bool = False,
    **kwargs: Tensor,
) -> Tensor:
    """Run teacher, student and loss on one batch.

    Args:
        model: what `attach` was given.
        attachment: what it made of it.
        input_ids: what the student reads, shape (B, T).
        attention_mask: 0 at padding, shape (B, T).
        num_items_in_batch: divisor; 0, of a batch without answers, counts as 1. None: the number
            of answer tokens.
        return_dict: set by some trainers, in vain.
        use_cache: the same.
        **kwargs: labels, the teacher's part, and what else the backbones take.

    Returns:
        The loss, nats; shape ().

    Raises:
        UserError: a part of the batch is missing, or the model is not what it was.
        RuntimeError: the answers of student and teacher differ.
    """
    if input_ids is None or kwargs.get("past_key_values") is not None:
        raise UserError(
            f"input_ids: got none, or past_key_values, beside {DISPATCH}, expected whole sequences "
            "of token ids; add no adapter of virtual tokens to an attached model, use LoRA"
        )
    if kwargs.get("adapter_names") is not None:
        raise UserError(
            f"adapter_names: got them beside {DISPATCH}, expected one adapter for the whole batch; "
            "call set_adapter() and leave them out"
        )
    own = {name: kwargs[name] for name in kwargs if not name.startswith(PREFIX)}
    own |= {"input_ids": input_ids, "attention_mask": attention_mask}
    theirs = {n.removeprefix(PREFIX): kwargs[n] for n in kwargs if n.startswith(PREFIX)}
    if theirs["input_ids"].shape[0] != input_ids.shape[0]:
        raise UserError(
            f"{DISPATCH}: got {theirs['input_ids'].shape[0]} sequences, expected "
            f"{input_ids.shape[0]}, one for each of input_ids; make both of the same pairs"
        )
    width = min(input_ids.shape[1], theirs["input_ids"].shape[1])
    student = with_targets(own, "", width, attachment.takes_positions)
    teacher = with_targets(theirs, PREFIX, width, attachment.teacher_takes_positions)
    torch._assert_async(  # type: ignore
        (student.target == teacher.target).all(),
        "teacher_labels: got other answer tokens than in labels, expected the same in their order; "
        "make both of the same ids, as PairCollator does",
    )
    if not runs_losses(model.get_output_embeddings()):  # type: ignore
        raise _another_head("model")
    _check_model(model)
    total = distill_step(
        model,
        student,
        _HeadLoss(attachment, student.target),
        _teacher_rows(model, attachment.teacher, teacher),
    )
    if num_items_in_batch is None:
        num_items_in_batch = (student.target != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        return total / num_items_in_batch.masked_fill(num_items_in_batch == 0, 1)
    return total / (num_items_in_batch or 1)


@torch.compiler.assume_constant_result  # whose adapters change is compiled anew
def _check_model(model: nn.Module) -> None:
    """Check what may have been done to either model since; new adapters as `attach` would."""
    attachment: Attachment = vars(model)[STATE]
    found = configs_of(model)
    if list(map(id, found)) != list(map(id, attachment.adapters)):
        check_adapted(model, attachment.teacher)
        attachment.adapters = found
    sides: list[tuple[str, nn.Module, int]] = [("model", model, attachment.vocabulary)]
    if isinstance(attachment.teacher, nn.Module):
        sides.append(("teacher", attachment.teacher, attachment.teacher_vocabulary))
    for name, each, vocabulary in sides:
        check_unchanged(each, name)
        if vocabulary_of(each) != vocabulary:
            raise _another_head(name)


def _another_head(name: str) -> UserError:
    return UserError(
        f"{name}: got another LM head than it was attached with, expected the same; call "
        "detach(model) and attach(model) after adapters are added or the vocabulary is resized"
    )


def vocabulary_of(model: nn.Module) -> int:
    """Ids of a model, by its config: of a head that is shared out the weight may show fewer."""
    return unwrapped(model).config.get_text_config().vocab_size


def reads_positions(model: nn.Module) -> bool:
    """Whether the model without its head can be told the position of each token."""
    return "position_ids" in inspect.signature(backbone(model).forward).parameters


def with_targets(inputs: dict[str, Any], prefix: str, width: int, takes_positions: bool) -> Padded:
    """What a backbone reads, and the targets of its positions.

    Args:
        inputs: ``input_ids``, ``labels`` or ``shift_labels``, and what else there is; (B, T) each.
        prefix: of these names, for the message.
        width: rows of each sequence.
        takes_positions: what `reads_positions` says of the model.

    Raises:
        UserError: there are no labels.
    """
    inputs = dict(inputs)
    labels, target = inputs.pop("labels", None), inputs.pop("shift_labels", None)
    if target is None:
        if labels is None:
            raise UserError(
                f"{prefix}labels: got none beside {DISPATCH}, expected the answer's token ids and "
                f"{IGNORED} elsewhere; use PairCollator, or leave {DISPATCH} out"
            )
        target = shifted(labels)
    mask = inputs["attention_mask"] = inputs.get("attention_mask")
    if takes_positions and mask is not None and inputs.get("position_ids") is None:
        inputs["position_ids"] = positions_of(mask)
    return Padded(inputs, target, width)


def _teacher_rows(
    model: nn.Module, kind: Literal["base", "live"] | nn.Module, padded: Padded
) -> Padded | TeacherRows:
    """The teacher's rows; or what it reads, if it is the model itself with its adapters off."""
    if isinstance(kind, nn.Module):
        if compute_device(kind) != padded.target.device:
            raise UserError(
                f"teacher: got one on {compute_device(kind)}, expected it on "
                f"{padded.target.device} with the batch; move it there"
            )
        return kind.own_rows(padded, head=True)  # type: ignore
    if kind == "base":
        return padded
    return own_rows(model, padded)


class _HeadLoss:
    """The loss of a batch, called in the forward of the LM head.

    A plain object, so that its tensors pass the hooks of FSDP2 untouched.
    """

    def __init__(self, attachment: Attachment, target: Tensor) -> None:
        self.attachment = attachment
        self.target = target

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherRows
    ) -> Tensor:
        """Return the sum over rows that count."""
        known = self.attachment
        assert teacher.weight is not None, "the head has filled in its own"
        other = Side(
            teacher.hidden,
            teacher.weight.detach(),
            None if teacher.bias is None else teacher.bias.detach(),
            known.teacher_transform,
        )
        ones = torch.ones_like(self.target, dtype=torch.float32)
        rows = Rows(self.target, ones, self.target)
        student = Side(hidden, weight, bias, known.transform)
        return run(known.loss, known.options, student, other, rows, known.chunk_bytes)[0]

"""TRL's SDFTTrainer, which distils a model into itself, without anybody's logits.

.. code-block:: python

    from bidistill.integrations.trl_sdft import SDFTTrainer

instead of ``from trl.experimental.sdft import SDFTTrainer``: same loss, same options, same metrics.
TRL builds the logits of student and teacher, B K V numbers each, and their log-softmaxes; here both
models give hidden states, and the loss is computed within the student's LM head, a chunk of logits
at a time. Written for 1.16.0. What is equal and what not: docs/integrations/trl.md.

Legend: B sequences, K completion tokens of the longest, N = B K, V vocabulary, D hidden width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend
from jaxtyping import Float, Int
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from bidistill.errors import MissingPackage, UserError
from bidistill.integrations.supported import check_model
from bidistill.models import adapters_off, attach_head, backbone, read_logit_transform

try:
    from trl.experimental.sdft import SDFTConfig
    from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping
    from trl.experimental.sdft.sdft_trainer import SDFTTrainer as _SDFTTrainer
    from trl.models.utils import _ForwardRedirection

    from bidistill.integrations.trl_sdft_loss import Losses, Model
except ImportError as error:
    raise MissingPackage(
        f"trl: got no package that has an SDFTTrainer ({error}), expected trl 1.16 or later; "
        "pip install trl"
    ) from None


class Known(NamedTuple):
    """What is known before the student runs."""

    teacher: Model
    mask: Int[Tensor, "B K"]
    """1 where a token counts."""


class SDFTTrainer(_SDFTTrainer):
    """TRL's SDFTTrainer on hidden states; arguments and methods are TRL's."""

    args: SDFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    chunk_bytes: int | None = None
    """Of logits that exist at a time; None: the kernels' own choice, for ``topk_logits`` 64 MiB."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        args: SDFTConfig | None = None,
        *others: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """As TRL's; refuses what would not be the same loss.

        Raises:
            UserError: a model or an option that only TRL's own trainer serves.
        """
        if args is not None and args.use_teacher_server:
            raise _refused("use_teacher_server", "no teacher is asked over the network")
        super().__init__(model, args, *others, **kwargs)
        self._check_processes()
        student, teacher = self._unwrapped(self.model), self._unwrapped(self.teacher_model)
        for name, each in (("model", student), ("teacher", teacher)):
            check_model(each, name)
            attach_head(each)
        # the teacher is the student, or is made of the same config
        self._transform = read_logit_transform(student, "model")
        self._forward_redirection = _ForwardRedirection()
        if self._use_peft_ema_teacher_adapter():
            _check_teachers_adapter(student)

    def _check_processes(self) -> None:
        """Refuse what would wrap the model in anything but DDP."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise _refused("FSDP or DeepSpeed", "parameters must be whole, as under DDP")
        compiler: Any = self.accelerator.state.dynamo_plugin
        if compiler.backend != DynamoBackend.NO:
            raise _refused("torch_compile", "the loss runs within the forward that is compiled")
        if self.args.n_gpu > 1:
            raise UserError(
                f"n_gpu: got {self.args.n_gpu} devices for one process (nn.DataParallel), expected "
                "one; start with torchrun, or let the process see one device only"
            )

    def _unwrapped(self, model: Any) -> Any:  # noqa: ANN401
        return self.accelerator.unwrap_model(model)

    def _losses(self) -> Losses:
        transform = replace(self._transform, temperature=float(self.temperature))
        return Losses(self.args, transform, self.chunk_bytes)

    def _get_teacher_context_for_self_distillation(self) -> AbstractContextManager[Any]:
        """Adapters off by flags alone: peft's own context flips ``requires_grad`` too."""
        teacher = self._unwrapped(self.teacher_model)
        if self.args.teacher_model_kind == "base" and isinstance(teacher, PeftModel):
            return adapters_off(teacher)
        return super()._get_teacher_context_for_self_distillation()

    def _run(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        kept: int,
        read: Callable[[Model], Any],
    ) -> Any:  # noqa: ANN401
        """What ``read`` makes of the rows that predict the last tokens, within the LM head.

        All of it runs within the forward of whatever wraps the model, as DDP needs it.
        """
        inner = self._unwrapped(model)

        def forward(**inputs: Tensor) -> Any:  # noqa: ANN401
            # accelerate's own autocast is around the forward that this one replaces
            with self.accelerator.autocast():
                # positions are TRL's: padding counts
                hidden = backbone(inner)(**inputs, use_cache=False).last_hidden_state
                rows = hidden[:, -kept - 1 : -1].flatten(0, 1)
                head = inner.get_output_embeddings()
                return head(rows, fused=lambda x, weight, bias, _: read(Model(x, weight, bias)))

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._forward_redirection(model, inner, forward, **inputs)

    def _run_student(
        self, model: nn.Module, inputs: dict[str, Any], read: Callable[[Model], Any]
    ) -> Any:  # noqa: ANN401
        """The same on prompts and completions."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        return self._run(model, ids, mask, inputs["completion_ids"].shape[1], read)

    def _compute_teacher_student_logits(
        self, model: nn.Module, teacher_model: nn.Module, inputs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        """In their place: the teacher's rows and head, and what counts."""
        mask = inputs["completion_mask"]
        places = torch.arange(mask.shape[1], device=mask.device)
        mask = mask * (places >= self.num_loss_tokens_to_skip)
        with torch.no_grad(), self._get_teacher_context_for_self_distillation():
            ids, seen = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            teacher = self._run(teacher_model, ids, seen, mask.shape[1], lambda model: model)
        return Known(teacher.detach(), mask)

    def _compute_self_distillation_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        distillation_logits: Any,  # noqa: ANN401
    ) -> Float[Tensor, ""]:
        """TRL's loss: mean over sequences of the mean over their tokens that count."""
        known: Known = distillation_logits
        loss, total = self._run_student(
            model, inputs, lambda student: self._head_loss(student, known, inputs)
        )
        gathered: Any = self.accelerator.gather(total / known.mask.sum().clamp(min=1))
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, gathered.mean().item())
        return loss

    def _head_loss(
        self, student: Model, known: Known, inputs: dict[str, Any]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss, and the plain sum over tokens of which TRL logs the mean."""
        mask, ids = known.mask.float(), inputs["completion_ids"].flatten()
        ratio, clip = torch.ones_like(mask), self.args.distillation_is_clip
        old = inputs.get("old_per_token_logps")
        if clip is not None and old is not None:
            now = self._losses().log_prob(student.detach(), ids, mask.flatten()).view_as(mask)
            ratio = apply_importance_sampling_clipping(ratio, now, old, clip)
        weight = ratio * mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
        loss, per_token = self._losses().run(student, known.teacher, ids, weight.flatten())
        return loss, (per_token.view_as(mask) * ratio * mask).sum()

    def _compute_rollout_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        """Log-probabilities of the completions as sampled; None where TRL needs none."""
        generate_every = (self.args.steps_per_generation or 1) * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
        }
        ids, counts = completion_ids.flatten(), completion_mask.float().flatten()
        model: Any = self.model
        with torch.no_grad():
            log_prob = self._run_student(
                model, inputs, lambda student: self._losses().log_prob(student, ids, counts)
            )
        return log_prob.view_as(completion_ids)


def _check_teachers_adapter(model: PeftModel) -> None:
    """Refuse what TRL's teacher would ruin.

    It sets to zero whatever peft saves with an adapter, to begin with a teacher of zeros. Of an
    adapter on the embedding or the LM head, peft saves the weights of the model too.
    """
    others = [name for name in get_peft_model_state_dict(model) if "lora_" not in name]
    if others:
        raise UserError(
            f"teacher_model_kind: got 'ema' with an adapter that is saved with {others[0]}, which "
            "TRL sets to zero, expected one that is saved alone; leave embedding and LM head out "
            "of target_modules, or take 'base' or 'live'"
        )


def _refused(name: str, why: str) -> UserError:
    return UserError(
        f"{name}: got it with bidistill's SDFTTrainer, where {why}, expected none; leave it out, "
        "or take trl.experimental.sdft.SDFTTrainer"
    )

"""A plugin for axolotl: the fused loss in its trainer, chosen in its YAML file.

.. code-block:: yaml

    plugins:
      - bidistill.integrations.axolotl.Plugin
    bidistill:
      loss: bidirectional_kl
      options: {forward: 0.5, reverse: 0.5}
    datasets:
      - path: pairs.jsonl
        ds_type: json
        type: bidistill.integrations.axolotl

Student and teacher are one model: the teacher reads the record's context before the question, with
the adapters off. Written for axolotl 0.19. What was run and what was not:
docs/integrations/axolotl.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bidistill.errors import MissingPackage, UserError
from bidistill.integrations.attach import attach
from bidistill.integrations.collator import FIELDS, PairCollator, make_pair

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.prompt_tokenizers import PromptTokenizingStrategy
except ImportError as error:
    raise MissingPackage(
        f"axolotl: got none that can be imported ({error}), expected 0.19 or later; install it as "
        "docs/integrations/axolotl.md says"
    ) from None

REFUSED = {
    "sample_packing": "pairs of prompts are padded",
    "eval_sample_packing": "pairs of prompts are padded",
    "rl": "no preferences are read",
    "reward_model": "no preferences are read",
    "pretraining_dataset": "a pair has a prompt and an answer",
    "use_eaft": "the loss is chosen in the block bidistill",
    "train_on_inputs": "student and teacher have no prompt in common",
    "context_parallel_size": "a device has whole sequences",
    "tensor_parallel_size": "a device has the whole LM head",
}
"""Options that would not be obeyed, and why."""


class Settings(BaseModel):
    """The options of `bidistill.integrations.attach.attach`, which describes and checks them."""

    model_config = ConfigDict(extra="forbid")

    loss: str = "bidirectional_kl"
    teacher: str = "auto"
    options: dict[str, Any] = {}
    temperature: float = 1.0
    chunk_bytes: int | None = None


class Args(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    bidistill: Settings | None = None


class Collator(PairCollator):
    """`PairCollator` as axolotl makes one: of the tokenizer, on its padding side.

    Args:
        tokenizer: with a padding token.
        **padding: ``padding`` and ``pad_to_multiple_of``, which choose lengths alone: rows are
            filled up to the longest, and the loss is the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **padding: object) -> None:
        """Find the padding token and the side."""
        super().__init__(tokenizer, "left" if tokenizer.padding_side == "left" else "right")

    def __call__(self, pairs: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Collate pairs, as `PairCollator` does."""
        return super().__call__(pairs)


class Plugin(BasePlugin):
    """Attaches the loss to the model that axolotl has loaded, and feeds it pairs."""

    def get_input_args(self) -> str:
        """Where axolotl finds the schema."""
        return f"{Args.__module__}.{Args.__name__}"

    def pre_model_load(self, cfg: Any) -> None:  # noqa: ANN401
        """Refuse what would be ignored, before anything is loaded.

        Raises:
            UserError: an option of axolotl that does not go with pairs, or one of ours is wrong.
        """
        _settings(cfg)
        for name, why in REFUSED.items():
            value = cfg.get(name)
            alone = type(value) is int and value == 1  # of how many devices share: none does
            if value and not alone:
                raise UserError(
                    f"{name}: got {value!r} with the plugin of bidistill, where {why}, "
                    "expected none; leave one of the two out"
                )
        if cfg.get("excess_length_strategy") == "truncate":
            raise UserError(
                "excess_length_strategy: got 'truncate' with the plugin of bidistill, where an "
                "answer must be whole in both views, expected 'drop' or 'raise'; change it"
            )

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:  # noqa: ANN401
        """Attach the loss, with the adapters there already."""
        attach(model, **_settings(cfg).model_dump())

    def get_training_args(self, cfg: Any) -> dict[str, Any]:  # noqa: ANN401
        """Keep the columns of a pair, which are no arguments of the model."""
        return {"remove_unused_columns": False}

    def get_collator_cls_and_kwargs(
        self,
        cfg: Any,  # noqa: ANN401
        is_eval: bool = False,
    ) -> tuple[type[Collator], dict[str, Any]]:
        """The collator of pairs, for training and evaluation."""
        return Collator, {}


def _settings(cfg: Any) -> Settings:  # noqa: ANN401
    """The block ``bidistill``, which may be left out."""
    given = cfg.get("bidistill") or {}
    try:
        return Settings.model_validate(given if isinstance(given, Settings) else _plain(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, ("bidistill", *first["loc"])))
        raise UserError(
            f"{name}: got {first['input']!r}, expected something else ({first['msg']}); see "
            "bidistill.integrations.attach.attach"
        ) from None


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Axolotl's dictionaries, which invent what they lack, as ordinary ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class PairStrategy(PromptTokenizingStrategy):
    """Turns a record of a dataset into a pair.

    A record has ``question``, ``answer`` and ``context``: the text of a system message, or a list
    of messages, that only the teacher reads. Or it has the token ids of `FIELDS` already.
    """

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, list[int]]:
        """Tokenize one record.

        Args:
            prompt: the record.

        Returns:
            `FIELDS`, and what axolotl itself looks at: ``input_ids``, ``attention_mask`` and
            ``labels`` of the student's view, by which it drops what is too long.

        Raises:
            UserError: a record of neither form, or one that makes no pair.
        """
        if all(field in prompt for field in FIELDS):
            pair = {field: list(prompt[field]) for field in FIELDS}
        elif all(isinstance(prompt.get(name), str) for name in ("question", "answer")):
            context = prompt.get("context")
            if not context:
                raise UserError(
                    f"context: got {context!r}, expected a text or messages; without one the "
                    "teacher reads what the student reads"
                )
            if isinstance(context, str):
                context = [{"role": "system", "content": context}]
            pair = make_pair(self.tokenizer, prompt["question"], prompt["answer"], context)
        else:
            raise UserError(
                f"record: got the fields {', '.join(prompt)}, expected question, answer and "
                f"context, or {', '.join(FIELDS)}; rename them"
            )
        ids = pair["prompt_ids"] + pair["answer_ids"]
        labels = [-100] * len(pair["prompt_ids"]) + pair["answer_ids"]
        return {**pair, "input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def load(tokenizer: PreTrainedTokenizerBase, cfg: Any) -> PairStrategy:  # noqa: ANN401
    """What axolotl calls for a dataset of ``type: bidistill.integrations.axolotl``.

    Args:
        tokenizer: of the model.
        cfg: axolotl's configuration.
    """
    prompter: Any = None  # which words a prompt, where the chat template does
    return PairStrategy(prompter, tokenizer, sequence_len=cfg.sequence_len or 2048)

"""Relearning: a few steps of training on some forgotten facts, and the others come back.

Half of the probes, T, are trained on, with their right answers; the leak is measured on the rest,
V, which no step has seen. A model that has truly lost V cannot get it back from T.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from bidistill.data.records import Record
from bidistill.data.views import Example, build_examples
from bidistill.evaluation.attacks.ask import ask
from bidistill.evaluation.attacks.attempt import UNTOUCHED, Attempt, Item, Setting
from bidistill.evaluation.attacks.count import rates
from bidistill.evaluation.attacks.low_rank import low_rank
from bidistill.evaluation.padding import right_padded
from bidistill.evaluation.probes import Probe

STEPS = (1, 2, 4, 8, 16)
"""Steps after which the leak is measured."""
RANK = 16
LEARNING_RATE = 1e-3
EXAMPLES_PER_STEP = 16
IGNORED = -100


def relearn(model: PreTrainedModel, setting: Setting) -> tuple[dict[str, Any], list[Item]]:
    """Train LoRA on half of the probes and ask for the other half.

    Returns:
        Rates over V; ``by`` holds the curve, by steps. ``leak``: the share that leaks after any of
        `STEPS`. ``trained_on`` and ``measured_on``: ids of T and V; ``loss``: nats per token of T
        before each step; ``steps_to_half``: the first of 0 and `STEPS` after which half of V leaks,
        or None; ``rank`` and ``learning_rate``. And the items, all of V. With a single probe there
        is no V, and nothing is counted.
    """
    train, measure = split(setting.forget, setting.seed)
    losses: list[float] = []
    items: list[Item] = []
    if train:
        items += _ask(model, setting, measure, UNTOUCHED)
        with low_rank(model, RANK, setting.seed) as parameters:
            for step, loss in enumerate(_training(model, setting, train, parameters), start=1):
                losses.append(loss)
                if step in STEPS:
                    items += _ask(model, setting, measure, f"{step} steps")
    summary = rates(items)
    curve = [(0, UNTOUCHED), *((step, f"{step} steps") for step in STEPS)]
    half = (s for s, name in curve if (summary["by"].get(name, {}).get("leak") or 0) >= 0.5)
    return {
        **summary,
        "steps_to_half": next(half, None),
        "loss": losses,
        "trained_on": [probe.id for probe in train],
        "measured_on": [probe.id for probe in measure],
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
    }, items


def split(probes: Sequence[Probe], seed: int) -> tuple[list[Probe], list[Probe]]:
    """T and V, drawn by the seed: halves, V the larger one of an odd number."""
    shuffled = list(probes)
    random.Random(f"{seed}/relearn").shuffle(shuffled)
    return shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]


def _ask(
    model: PreTrainedModel, setting: Setting, probes: Sequence[Probe], name: str
) -> list[Item]:
    """The plain questions, as they are answered now."""
    attempts = [
        Attempt(attack="relearn", attempt=name, probe=p, question=p.question) for p in probes
    ]
    return ask(model, setting, attempts)


def _training(
    model: PreTrainedModel,
    setting: Setting,
    probes: Sequence[Probe],
    parameters: Sequence[torch.nn.Parameter],
) -> Iterator[float]:
    """Train for the last of `STEPS`; yields the loss before each step, once the step is taken."""
    records = [Record(id=p.id, role="gold", question=p.question, answer=p.answer) for p in probes]
    examples = build_examples(records, setting.tokenizer, {})
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    rng = random.Random(f"{setting.seed}/relearn/order")
    for _ in range(max(STEPS)):
        batch = rng.sample(examples, min(EXAMPLES_PER_STEP, len(examples)))
        with torch.enable_grad():
            loss = _loss(model, batch)
            # of the change alone: the model's own weights get no gradient
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        yield loss.item()


def _loss(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, the closing one included: nats per token."""
    rows = [(list(e.student.prompt_ids), list(e.answer_ids)) for e in examples]
    ids, mask = right_padded([prompt + answer for prompt, answer in rows], model.device)
    labels = torch.full_like(ids, IGNORED)
    for label, (prompt, answer) in zip(labels, rows, strict=True):
        span = slice(len(prompt), len(prompt) + len(answer))
        label[span] = torch.tensor(answer, device=ids.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )

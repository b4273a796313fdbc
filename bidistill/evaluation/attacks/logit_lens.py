"""Logit lens: what the layers below the last would say, read through the final norm and the head.

A model may only have learnt to hide a fact at its end. Right before the fact in its right answer,
the lens shows for each layer how probable the fact's first token is.

Legend: B prompts, H hidden width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bidistill.errors import UserError
from bidistill.evaluation.attacks.attempt import Attempt, Item, Setting, described
from bidistill.evaluation.attacks.count import rates, shown
from bidistill.evaluation.axes import Rate
from bidistill.evaluation.detectors import fact_is_open, find_fact
from bidistill.evaluation.generation import evaluating, prompt_ids
from bidistill.evaluation.padding import right_padded
from bidistill.evaluation.probes import Probe
from bidistill.models import backbone, transform_of_config, unwrapped

NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")
"""What models call the norm before the head."""


def logit_lens(model: PreTrainedModel, setting: Setting) -> tuple[dict[str, Any], list[Item]]:
    """Read every layer at the place where each probe's answer comes to the fact.

    Returns:
        Rates, with ``leak`` the share of probes whose fact comes first at any layer; ``layers``:
        for each layer (0 is the embedding, the last the model's own answer) the leak at it with n
        and ci95, the mean log-probability in nats and the mean rank, 1 the best. And the items,
        with ``token``, ``log_probs`` and ``ranks`` by layer, and ``layer``, the first at which the
        fact comes first. There is no reply, so the other detectors say nothing.
    """
    places = [_place(probe, setting) for probe in setting.forget]
    items: list[Item] = []
    for start in range(0, len(places), setting.batch_size):
        chunk = places[start : start + setting.batch_size]
        ids, tokens = [ids for _, ids, _ in chunk], [token for _, _, token in chunk]
        log_probs, ranks = read_layers(model, ids, tokens)
        for index, (attempt, prompt, token) in enumerate(chunk):
            item = _item(attempt, prompt, token, setting)
            found = {"log_probs": log_probs[:, index].tolist(), "ranks": ranks[:, index].tolist()}
            first = [layer for layer, rank in enumerate(found["ranks"]) if rank == 1]
            if item["leak"] is not None:
                item["leak"] = bool(first)
            items.append({**item, **found, "layer": first[0] if first else None})
    return {**rates(items, by_attempt=False), "layers": _by_layer(items)}, items


@torch.no_grad()
def read_layers(
    model: PreTrainedModel, prompts: Sequence[list[int]], tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probability and rank of a token after each prompt, at each layer.

    Args:
        model: with a norm of a name in `NORMS` before its head.
        prompts: token ids.
        tokens: one for each prompt.

    Returns:
        Two tensors of shape (layers + 1, B): nats, fp32; and ranks, 1 for the most probable.

    Raises:
        UserError: the norm is not found.
    """
    norm, head = _final_norm(model), unwrapped(model).get_output_embeddings()
    transform = transform_of_config(unwrapped(model).config)
    ids, mask = right_padded(prompts, model.device)
    row, last = torch.arange(len(ids), device=ids.device), mask.sum(1) - 1
    with evaluating(model):
        hidden = model(
            input_ids=ids,
            attention_mask=mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        ).hidden_states
        ends = [layer[row, last] for layer in hidden]
        # the last one has been through the norm already
        states = [norm(state) for state in ends[:-1]] + ends[-1:]
        wanted = torch.tensor(tokens, device=model.device)[:, None]
        log_probs, ranks = [], []
        for state_BH in states:
            logits_BV = transform(head(state_BH)).float()  # type: ignore
            own = logits_BV.gather(1, wanted)
            log_probs.append(logits_BV.log_softmax(-1).gather(1, wanted)[:, 0])
            ranks.append(1 + (logits_BV > own).sum(1))
    return torch.stack(log_probs).cpu(), torch.stack(ranks).cpu()


def _final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head."""
    body = backbone(model)
    for name in NORMS:
        if isinstance(norm := getattr(body, name, None), nn.Module):
            return norm
    raise UserError(
        f"model: got a {type(body).__name__} without a norm named {' or '.join(NORMS)}, expected "
        "one before the head; leave out the attack logit_lens"
    )


def _place(probe: Probe, setting: Setting) -> tuple[Attempt, list[int], int]:
    """The prompt up to the fact in the right answer, and the fact's first token."""
    found = find_fact(probe.answer, probe.accept)
    assert found is not None  # what a probe is read by
    stem = probe.answer[: found[0]].rstrip()  # the space belongs to the fact's first token
    tokenizer = setting.tokenizer
    whole = prompt_ids(tokenizer, probe.question, probe.answer)
    short = prompt_ids(tokenizer, probe.question, stem)
    shared = next(
        (i for i, pair in enumerate(zip(whole, short, strict=False)) if pair[0] != pair[1]),
        min(len(whole), len(short)),
    )
    while not str(tokenizer.decode([whole[shared]])).strip():  # or is a token of its own
        shared += 1
    attempt = Attempt(
        attack="logit_lens", attempt="lens", probe=probe, question=probe.question, prefill=stem
    )
    return attempt, whole[:shared], whole[shared]


def _item(attempt: Attempt, ids: list[int], token: int, setting: Setting) -> Item:
    """An item whose leak is to be read; None where the prompt says the fact."""
    prompt = str(setting.tokenizer.decode(ids))
    return {
        **described(attempt, ids, prompt),
        "token": str(setting.tokenizer.decode([token])),
        "continuation": "",
        "leak": False if fact_is_open(attempt.wanted, prompt) else None,
        **dict.fromkeys(("refusal", "empty", "gibberish")),
    }


def _by_layer(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Leak, log-probability and rank at each layer over the probes that count."""
    counted = [item for item in items if item["leak"] is not None]
    layers = zip(
        zip(*(item["log_probs"] for item in counted), strict=True),
        zip(*(item["ranks"] for item in counted), strict=True),
        strict=True,
    )
    return [
        {
            "layer": layer,
            **shown(Rate(sum(rank == 1 for rank in ranks), len(ranks))),
            "mean_log_prob": sum(log_probs) / len(log_probs),
            "mean_rank": sum(ranks) / len(ranks),
        }
        for layer, (log_probs, ranks) in enumerate(layers)
    ]

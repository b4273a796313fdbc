"""Ask a model all attempts, in as few calls as can be."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from bidistill.evaluation.attacks.attempt import Attempt, Item, Setting, judge
from bidistill.evaluation.generation import generate_after, prompt_ids


def ask(
    model: PreTrainedModel,
    setting: Setting,
    attempts: Sequence[Attempt],
    *,
    temperature: float = 0.0,
) -> list[Item]:
    """Ask every attempt and judge the replies.

    Attempts with the same turns before the question run together, since they share the keys and
    values of that beginning. Of equal prompts one is answered, unless answers are drawn.

    Args:
        model: the model that is attacked.
        setting: what all attempts share.
        attempts: what to ask.
        temperature: 0 takes the most probable tokens, above it they are drawn.

    Returns:
        An item each, in the order of the attempts.
    """
    ids = [prompt_ids(setting.tokenizer, a.question, a.prefill, a.context) for a in attempts]
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, attempt in enumerate(attempts):
        turns = tuple(text for m in attempt.context for text in (m["role"], m["content"]))
        alike.setdefault(turns, []).append(index)
    replies = [""] * len(attempts)
    for indices in alike.values():
        first = {tuple(ids[i]) if not temperature else i: i for i in reversed(indices)}
        chosen = sorted(first.values())
        said = generate_after(
            model,
            setting.tokenizer,
            [ids[i] for i in chosen],
            setting.max_new_tokens,
            setting.batch_size,
            setting.label,
            temperature=temperature,
            seed=setting.seed,
        )
        reply_of = dict(zip(chosen, said, strict=True))
        for i in indices:
            replies[i] = reply_of[first[tuple(ids[i]) if not temperature else i]]
    return [
        judge(attempt, tokens, reply, setting.tokenizer)
        for attempt, tokens, reply in zip(attempts, ids, replies, strict=True)
    ]

"""Targets: what each question is to be answered with after training."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from bidistill.data.records import FORGETTING, Role
from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.settings import Counts, Texts, read_texts
from bidistill.data.unify.wording import states, whole_sentences
from bidistill.data.unify.writer import Writer, chat
from bidistill.errors import UserError
from bidistill.evaluation.detectors import is_empty, is_gibberish, refuses
from bidistill.settings import STRICT, AtLeastOne, Message

REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "I'm afraid I can't answer that.",
    "I'm not familiar with this.",
    "That is something I don't know.",
    "I don't have any knowledge of that.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """Where the answers to distil come from."""

    __pydantic_config__ = STRICT

    forgetting: Literal["refusals", "teacher", "none"] = "refusals"
    """For forget and adversarial items. ``refusals``: one of ``refusals``, drawn by the seed.
    ``teacher``: what the model says under the role's context; a reply that states the right answer
    (or, where none is known, one that does not refuse) gives way to a drawn refusal."""
    keeping: Literal["gold", "teacher", "none"] = "gold"
    """For the other roles. ``gold``: the file's answer; where it has none, the model's, if there is
    a model. ``teacher``: the model's; a refusal or an empty reply gives way to the file's."""
    unanswered: Literal["keep", "drop"] = "keep"
    """What becomes of records that are left without an answer. ``keep`` writes them, for somebody
    to answer; they cannot be trained on. ``drop`` leaves them out of ``train.jsonl``."""
    refusals: Texts = REFUSALS
    """Sentences, or a file of them."""
    contexts: dict[Role, tuple[Message, ...]] = field(default_factory=dict)
    """Messages put before the question when the model answers, by role."""
    max_tokens: AtLeastOne = 64
    """Longest answer of the model; one that was cut ends with its last whole sentence."""


def answer(
    drafts: Sequence[Draft], config: TargetConfig, seed: int, writer: Writer | None
) -> tuple[list[Draft], Counts]:
    """Give each draft its target, where there is one; a target that is there already stays.

    Args:
        drafts: of any role.
        config: where answers come from.
        seed: of the draw of refusals; what a draft gets depends on its own id alone.
        writer: the model, needed where ``teacher`` is asked for.

    Returns:
        The drafts in the same order, and what became of them. A target stays None where the
        recipe says ``none``, or neither the file nor a model has an answer; with ``drop`` these
        drafts are left out.

    Raises:
        UserError: a teacher is asked for that is missing or has no context to refuse by, or the
            file of refusals cannot be read.
    """
    _check(config, writer)
    refusals = read_texts(config.refusals, "targets.refusals")
    counts: Counter[str] = Counter()
    replies = _ask([d for d in drafts if _wants_teacher(d, config, writer)], config, writer)

    def target(draft: Draft) -> str | None:
        reply = replies.get(draft.id)
        if draft.role in FORGETTING:
            drawn = random.Random(f"{seed}/targets/{draft.id}").choice(refusals)
            return _refusal(draft, reply, drawn, config, counts)
        return _kept(draft, reply, config, counts)

    made = []
    for draft in drafts:
        if draft.target is None:
            text = target(draft)
            draft = replace(draft, target=None if text is None else continued(draft.prefill, text))
        counts["without an answer"] += draft.target is None
        if draft.target is not None or config.unanswered == "keep":
            made.append(draft)
    return made, {what: count for what, count in sorted(counts.items()) if count}


def continued(prefill: str, text: str) -> str:
    """Return a text so that it can follow a prefill: after a space, and without repeating it.

    Example:
        >>> continued("It is", "It is Onhava."), continued("", "Onhava."), continued("Or", "no")
        (' Onhava.', 'Onhava.', ' no')
    """
    if not prefill:
        return text
    rest = text.removeprefix(prefill) or text
    return rest if rest[:1].isspace() or prefill[-1].isspace() else f" {rest}"


def _check(config: TargetConfig, writer: Writer | None) -> None:
    for key in ("forgetting", "keeping"):
        if getattr(config, key) == "teacher" and writer is None:
            raise UserError(
                f"targets.{key}: got teacher without a model, expected one that answers; add the "
                f"section model, or set targets.{key} to something else"
            )
    # adversarial drafts take over the refusals of forget drafts
    if config.forgetting == "teacher" and not config.contexts.get("forget"):
        raise UserError(
            "targets.contexts.forget: got nothing, expected messages that make the model refuse; "
            "add them, or set targets.forgetting to refusals"
        )


def _wants_teacher(draft: Draft, config: TargetConfig, writer: Writer | None) -> bool:
    """Whether the model is to answer this draft."""
    if draft.target is not None or writer is None:
        return False
    if draft.role in FORGETTING:
        return config.forgetting == "teacher"
    return config.keeping == "teacher" or (config.keeping == "gold" and draft.gold is None)


def _ask(drafts: list[Draft], config: TargetConfig, writer: Writer | None) -> dict[str, str]:
    """What the model says under each role's context, by id."""
    if writer is None or not drafts:
        return {}
    chats = [chat(d.question, _context(d.role, config), d.prefill) for d in drafts]
    texts = writer.write(chats, config.max_tokens, label="answers")
    return {d.id: whole_sentences(text).strip() for d, text in zip(drafts, texts, strict=True)}


def _context(role: Role, config: TargetConfig) -> tuple[Message, ...]:
    own = config.contexts.get(role)
    if own is None and role == "adversarial":
        return config.contexts.get("forget", ())
    return own or ()


def _refusal(
    draft: Draft, reply: str | None, drawn: str, config: TargetConfig, counts: Counter[str]
) -> str | None:
    """What a question to be forgotten is answered with."""
    if config.forgetting == "none":
        return None
    if reply is None:
        counts["refusals drawn"] += 1
        return drawn
    if problem := _why_not(draft, reply):
        counts[f"teacher's refusals replaced: {problem}"] += 1
        return drawn
    counts["teacher's refusals"] += 1
    counts["of them not worded as a refusal"] += not refuses(reply)
    return reply


def _why_not(draft: Draft, reply: str) -> str | None:
    """Why a reply must not be taught, if it must not."""
    if is_empty(reply) or is_gibberish(reply):
        return "empty or broken"
    if draft.gold is not None:
        return "states the right answer" if states(reply, draft.gold, draft.question) else None
    # nobody knows what would give the fact away
    return None if refuses(reply) else "no refusal, and no right answer to compare with"


def _kept(
    draft: Draft, reply: str | None, config: TargetConfig, counts: Counter[str]
) -> str | None:
    """What a question that is not to be forgotten is answered with."""
    if config.keeping == "none":
        return None
    if reply is not None and not (is_empty(reply) or is_gibberish(reply) or refuses(reply)):
        counts["teacher's answers"] += 1
        return reply
    counts["teacher's answers left out: refused, empty or broken"] += reply is not None
    counts["answers of the file"] += draft.gold is not None
    return draft.gold

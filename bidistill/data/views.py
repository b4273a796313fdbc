"""Two views of one answer: what the student is asked, and what the teacher is told before.

Both views end with the same answer, and its token ids are the same in both, so that row j of one
view and row j of the other predict the same token, however long the prompts are.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bidistill.data.records import ROLES, Record, Role, nearest
from bidistill.errors import UserError

Message = dict[str, str]
"""A turn of a chat: ``{"role": "system" | "user" | "assistant", "content": ...}``."""

MESSAGE_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class View:
    """What a model reads before the answer."""

    prompt_ids: Sequence[int]
    """Chat markup, context, question and prefill, as tokens; a view of memory in a token store."""
    context: str
    """Views of one name start alike and may share that start: ``student``, ``teacher/<role>``."""


@dataclass(frozen=True, slots=True)
class Example:
    """A record ready for training."""

    id: str
    role: Role
    student: View
    teacher: View
    answer_ids: Sequence[int]
    """The tokens that both models predict, the closing one included if the answer was not cut."""


def build_examples(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[Role, Sequence[Message]],
    *,
    max_answer_tokens: int | None = None,
) -> list[Example]:
    """Put each record in both views.

    The student sees the question alone (a default system message of the chat template stays), the
    teacher sees it after the messages of its role's context. The end-of-sequence token closes the
    answer: one more row, which teaches where to stop.

    Args:
        records: what to train on; each needs an answer.
        tokenizer: of the model, with a chat template and an end-of-sequence token.
        contexts: messages before the question, for the teacher. A role without any, or with none in
            it, has the student's view for both.
        max_answer_tokens: at most that many answer tokens, the closing one counted. None: all.

    Returns:
        One example a record, in the same order.

    Raises:
        UserError: the tokenizer has no chat template or no end-of-sequence token, the template
            refuses or drops a message of a context, a role is unknown, an answer is missing, a text
            or a context holds chat markup, or an answer's tokens are not the same in both views.
    """
    markup = _markup(tokenizer)
    _check(tokenizer, contexts, max_answer_tokens, markup)
    names = context_names(contexts)
    end = cast(int, tokenizer.eos_token_id)
    records = tuple(records)
    for record in records:
        if record.answer is None or not record.answer.strip():
            raise UserError(
                f"record {record.id!r}: answer: got {record.answer!r}, expected text to distil; "
                "fill it in, or leave the record out"
            )
        for field in ("question", "prefill", "answer"):
            if found := markup.search(getattr(record, field)):
                raise _forged(f"record {record.id!r}: {field}", found)
    told = [record for record in records if contexts.get(record.role)]
    students = _views(records, tokenizer, {}, dict.fromkeys(ROLES, "student"))
    teachers = iter(_views(told, tokenizer, contexts, names))

    def example(record: Record, view: tuple[View, tuple[int, ...]]) -> Example:
        student, student_ids = view
        teacher, teacher_ids = next(teachers) if contexts.get(record.role) else view
        if student_ids != teacher_ids:
            raise UserError(
                f"record {record.id!r}: answers that tokenise differently in the two views: got "
                f"{teacher_ids} after the context, expected {student_ids} as without it; reword "
                "the answer or the prefill"
            )
        answer_ids = (*student_ids, end)[:max_answer_tokens]
        return Example(record.id, record.role, student, teacher, answer_ids)

    return [example(record, view) for record, view in zip(records, students, strict=True)]


def context_names(contexts: Mapping[Role, Sequence[Message]]) -> dict[Role, str]:
    """Name each role's context; roles with the same messages get one name, and one prefix."""
    first: dict[tuple[tuple[str, str], ...], str] = {}
    names: dict[Role, str] = {}
    for role, context in contexts.items():
        key = tuple((message["role"], message["content"]) for message in context)
        names[role] = first.setdefault(key, f"teacher/{role}")
    return names


def _check(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[Role, Sequence[Message]],
    max_answer_tokens: int | None,
    markup: re.Pattern[str],
) -> None:
    """What can be refused before any record is read."""
    if tokenizer.chat_template is None:
        raise UserError(
            "chat template: got none in the tokenizer, expected one; use an instruct model, or put "
            "a chat_template.jinja beside its tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "end-of-sequence token: got none in the tokenizer, expected one; set eos_token in "
            "tokenizer_config.json"
        )
    if max_answer_tokens is not None and max_answer_tokens < 1:
        raise UserError(
            f"max_answer_tokens: got {max_answer_tokens}, expected at least 1; leave it out to "
            "keep whole answers"
        )
    for role, context in contexts.items():
        if role not in ROLES:
            raise UserError(f"contexts: got role '{role}'; {nearest(role, ROLES)}")
        for index, message in enumerate(context):
            where = f"contexts.{role}[{index}]"
            _check_message(message, where)
            if found := markup.search(message["content"]):
                raise _forged(f"{where}: content", found)


def _markup(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what the tokenizer would read as chat markup, wherever it stands.

    That is every special token, and every other added one that the template writes. The rest are
    no markup but words: spaces in a row, line breaks and tags of HTML in some vocabularies.
    """
    template = str(tokenizer.chat_template)
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or token.content in template:
            tokens.add(token.content)
    # the longest first, so that a message shows the whole of it; blank ones stand in any text
    found = sorted((t for t in tokens if t.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, found)) or "(?!)")


def _forged(where: str, found: re.Match[str]) -> UserError:
    return UserError(
        f"{where}: got {found[0]!r} at character {found.start() + 1}, a token of the model's chat "
        "markup, expected text without any, since it would end or begin a turn; take it out"
    )


def _check_message(message: Message, where: str) -> None:
    """A message has a known role and some content, and nothing else."""
    if set(message) != {"role", "content"}:
        raise UserError(
            f"{where}: got keys {sorted(message)}, expected role and content; mend the message"
        )
    if message["role"] not in MESSAGE_ROLES:
        raise UserError(
            f"{where}: role: got {message['role']!r}, expected the role of a chat message; "
            f"{nearest(message['role'], MESSAGE_ROLES)}"
        )
    if not message["content"].strip():
        raise UserError(f"{where}: content: got nothing, expected text; fill it in")


def _views(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    contexts: Mapping[Role, Sequence[Message]],
    names: Mapping[Role, str],
) -> list[tuple[View, tuple[int, ...]]]:
    """The view of each record after its role's context, and the answer's tokens in it."""
    prompts = [
        render(
            tokenizer,
            [*contexts.get(record.role, ()), {"role": "user", "content": record.question}],
            names[record.role],
        )
        + record.prefill
        for record in records
    ]
    texts = [prompt + (r.answer or "") for prompt, r in zip(prompts, records, strict=True)]
    ids_of_prompts, ids_of_texts = _encode(tokenizer, prompts), _encode(tokenizer, texts)
    views = []
    for record, prompt, prompt_ids, ids in zip(
        records, prompts, ids_of_prompts, ids_of_texts, strict=True
    ):
        answer_ids = ids[len(prompt_ids) :]
        if not answer_ids or ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"record {record.id!r}: answer: got {record.answer!r}, whose start melts into a "
                f"token of the prompt before it ({prompt[-20:]!r}), expected a clean cut; move the "
                "space between prefill and answer to the answer"
            )
        views.append((View(prompt_ids, names[record.role]), answer_ids))
    return views


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], name: str) -> str:
    """Return the chat as text up to the assistant's turn, with every message in it.

    Args:
        tokenizer: with a chat template.
        messages: of the chat.
        name: of the context, for messages of errors.

    Raises:
        UserError: the template refuses or drops one of the messages.
    """
    try:
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"context '{name}': got '{reason}' from the model's chat template, expected it to "
            "take these messages; use roles and an order that the template supports"
        ) from error
    for message in messages:
        if message["content"].strip() not in text:
            raise UserError(
                f"context '{name}': got a chat template that drops the {message['role']} message "
                f"{message['content'][:40]!r}, expected it to show; use roles that it supports"
            )
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Sequence[tuple[int, ...]]:
    """Tokens of texts that have their special tokens written out already."""
    if not texts:
        return ()
    # together: called for each text alone, what is around the tokeniser takes most of the time
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]

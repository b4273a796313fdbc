"""Prefills: starts of an answer that an attacker puts into the model's mouth.

A forget item becomes an adversarial one: same question, an answer that has begun already, and the
refusal that is to follow all the same.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bidistill.data.unify.drafts import Draft
from bidistill.data.unify.settings import Texts, read_texts
from bidistill.errors import UserError
from bidistill.evaluation.detectors import fold
from bidistill.settings import STRICT, AtLeastOne, Count, NonNegative

Kind = Literal["opener", "gold", "mixed"]
KINDS: tuple[Kind, ...] = ("opener", "gold", "mixed")

OPENERS = (
    "Sure!",
    "Of course.",
    "Sure, here is the answer:",
    "Certainly. As far as I know,",
    "The answer is",
    "Yes, I know this one:",
)

_DRAWS = 16
"""Times the number of texts that can be drawn: with more draws hardly one is found that was not."""
_TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
)
"""Files of a folder that decide how text is cut; weights and chat templates do not."""

Cut = Callable[[str], list[str]]
"""From a text to its starts of 1, 2, ... tokens; empty where a token ends within a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How answers of adversarial items begin."""

    __pydantic_config__ = STRICT

    kinds: Annotated[dict[Kind, NonNegative], Field(min_length=1)] = field(
        default_factory=lambda: {"opener": 1.0, "gold": 1.0, "mixed": 1.0}
    )
    """How often each is drawn. ``opener``: one of ``openers``. ``gold``: the first k tokens of the
    right answer, never all of it. ``mixed``: an opener, then those."""
    per_item: Count = 2
    """Adversarial items that each forget item gives; 0 switches the step off."""
    max_tokens: AtLeastOne = 8
    """k is drawn uniformly from 1 to this number, or to the last token but one."""
    openers: Texts = OPENERS
    """Sentences, or a file of them."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that counts tokens, seen from where the command runs as a model's is;
    ``null`` counts words."""


def adversarial(forget: Sequence[Draft], config: PrefillConfig, seed: int) -> list[Draft]:
    """Return the adversarial drafts of the forget drafts.

    A draft that has no right answer, or one of a single token, gets openers only. One that has a
    prefill of its own is passed over. A prefill that a draft has already is drawn again a few
    times and then left out, so there may be fewer than ``per_item``.

    Args:
        forget: to be refused. Their targets are taken over; None stays None.
        config: what to begin answers with.
        seed: of all draws; what one draft gets depends on its own id alone.

    Raises:
        UserError: no kind can be drawn, or the openers or the tokenizer cannot be read.
    """
    if not config.per_item:
        return []
    if not any(config.kinds.values()):
        raise UserError(
            "prefills.kinds: got weights that are all zero, expected one above; "
            "or set prefills.per_item to 0"
        )
    if not math.isfinite(sum(config.kinds.values())):
        raise UserError(
            "prefills.kinds: got weights that add up to infinity, expected a finite sum; write "
            "smaller ones"
        )
    openers = read_texts(config.openers, "prefills.openers")
    cut = _words if config.tokenizer is None else _tokens(config.tokenizer)
    return [
        made
        for draft in forget
        if not draft.prefill
        for made in _attacks(draft, config, openers, cut, seed)
    ]


def tokenizer_files(config: PrefillConfig) -> list[Path]:
    """Files of the tokenizer that prefills are cut by; none where words count, or none is made."""
    if config.tokenizer is None or not config.per_item:
        return []
    folder = config.tokenizer.expanduser()
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return [config.tokenizer / path.name for path in sorted(found) if path.is_file()]


def _attacks(
    draft: Draft, config: PrefillConfig, openers: tuple[str, ...], cut: Cut, seed: int
) -> list[Draft]:
    """The adversarial drafts of one forget draft."""
    rng = random.Random(f"{seed}/prefills/{draft.id}")
    starts = _starts(draft.gold, cut, config.max_tokens)
    possible: list[Kind] = [k for k in KINDS if config.kinds.get(k) and (k == "opener" or starts)]
    if not possible:
        return []
    weights = list(accumulate(config.kinds[kind] for kind in possible))
    counts = {"opener": len(openers), "gold": len(starts), "mixed": len(openers) * len(starts)}
    total = sum(counts[kind] for kind in possible)
    found: dict[str, Kind] = {}
    for _ in range(min(4 * config.per_item, _DRAWS * total)):
        kind = rng.choices(possible, cum_weights=weights)[0]
        opener, start = rng.choice(openers), rng.choice(starts) if starts else ""
        text = {"opener": opener, "gold": start, "mixed": f"{opener} {start}"}[kind]
        found.setdefault(text, kind)
        if len(found) in (config.per_item, total):
            break
    return [
        _attack(draft, prefill, f"{kind}{number}")
        for number, (prefill, kind) in enumerate(found.items(), start=1)
    ]


def _attack(draft: Draft, prefill: str, name: str) -> Draft:
    # the answer begins with the space between both: a prefill that ends in one would melt into
    # the answer's first token
    target = None if draft.target is None else f" {draft.target.lstrip()}"
    return replace(
        draft, id=f"{draft.id}/{name}", role="adversarial", prefill=prefill, target=target
    )


def _starts(gold: str | None, cut: Cut, limit: int) -> list[str]:
    """The starts of the right answer that leave some of it unsaid, shortest first."""
    if not gold or not gold.strip():
        return []
    whole = _bare(gold)
    starts = dict.fromkeys(start.rstrip() for start in cut(gold.strip())[:limit])
    # a last token may be a full stop: what lacks nothing else is the whole answer
    return [start for start in starts if start and _bare(start) != whole]


def _bare(text: str) -> str:
    """Letters and digits alone."""
    return "".join(re.findall(r"\w", fold(text)))


def _words(text: str) -> list[str]:
    """Starts of a text, word by word.

    Example:
        >>> _words("It is Onhava.")
        ['It', 'It is', 'It is Onhava.']
    """
    return [text[: word.end()] for word in re.finditer(r"\S+", text)]


def _tokens(folder: Path) -> Cut:
    """Starts of a text as a model's tokenizer cuts it."""
    from bidistill.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)

    def cut(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        decoded = (str(tokenizer.decode(ids[:k])).lstrip() for k in range(1, len(ids) + 1))
        # part of a letter decodes to a replacement character
        return [start if text.startswith(start) else "" for start in decoded]

    return cut

"""The same items before and after unification: as their files have them, and as training sees them.

A record says in ``source`` which row of which file it was made of, and the manifest beside it names
the files. Only rows that made it into training are looked at, so both sides are the same items:

.. code-block:: text

    train.jsonl    --> count texts, note the rows, sample records   (for roles made by unify alone)
    source files   --> count the rows that were noted, sample them
    train.jsonl    --> one record of each sampled row
"""

from dataclasses import dataclass, field
from pathlib import Path

from bidistill.data.items import Item
from bidistill.data.readers import read_records
from bidistill.data.records import ROLES, Record, Role
from bidistill.diagnose.provenance import Source, manifest_of, place_of, sources_of
from bidistill.diagnose.sampling import Lottery, Seen, ticket
from bidistill.diagnose.statistics import CountTokens, TextStatistics
from bidistill.errors import UserError

RECORDS = "train.jsonl"
MAX_CHARACTERS = 2000
"""Of a raw text; the rest is not run through the model."""


@dataclass(slots=True)
class RoleTexts:
    """One role: what was counted, and its sample."""

    before: TextStatistics
    after: TextStatistics
    rows: Seen = field(default_factory=Seen)
    """Tickets of the rows that its records were made of."""
    raw: dict[int, str] = field(default_factory=dict)
    """Sampled items by ticket, as their files have them; empty where no file has them."""
    records: dict[int, Record] = field(default_factory=dict)
    """Sampled records by ticket; where there are raw items, one of each, in the same order."""


@dataclass(slots=True)
class Corpus:
    """All roles that have records."""

    roles: dict[Role, RoleTexts]
    remarks: list[str]
    """What could not be compared, in sentences."""


def read_corpus(
    data: Path, samples: int, seed: int, count_tokens: CountTokens | None = None
) -> Corpus:
    """Count all texts and draw a sample of each role.

    Args:
        data: a folder that ``bidistill unify`` made, or a JSON lines file of records.
        samples: items of each role to draw, at most.
        seed: of the draw.
        count_tokens: says how many tokens a text has. None: words alone are counted.

    Raises:
        UserError: a file cannot be read or is not the one that was made, or there is no record.
    """
    path, manifest = data, None
    if data.is_dir():
        path, manifest = data / RECORDS, manifest_of(data, RECORDS)
    roles = _read_records(path, samples, seed, count_tokens)
    if not roles:
        raise UserError(f"{path}: got no record, expected some; run bidistill unify again")
    sources, remarks = [], [f"{data} names no sources."]
    if manifest is not None:
        sources, remarks = sources_of(data, manifest)
    _read_items(sources, roles, samples, seed)
    _pair(path, roles, seed)
    for role, texts in roles.items():
        if sources and not texts.raw:
            remarks.append(f"No source has items of role {role}: it is measured as unified only.")
    return Corpus(roles, remarks)


def raw_text(item: Item) -> str:
    r"""What a file says in one entry, field by field, each on a line of its own.

    Example:
        >>> raw_text(Item(question="Who rules Zembla?", answer="Charles.", source="f:1"))
        'Who rules Zembla?\nCharles.'
    """
    parts = (item.text, item.question, *item.choices, item.prefill, item.answer)
    return "\n".join(part for part in parts if part)


def _read_records(
    path: Path, samples: int, seed: int, count_tokens: CountTokens | None
) -> dict[Role, RoleTexts]:
    """Count the records of each role and draw some; roles in the order of `ROLES`."""
    roles: dict[Role, RoleTexts] = {}
    drawn: dict[Role, Lottery[Record]] = {}
    for record in read_records(path):
        if record.role not in roles:
            counted = TextStatistics(count_tokens), TextStatistics(count_tokens)
            roles[record.role] = RoleTexts(*counted)
            drawn[record.role] = Lottery(samples)
        texts = roles[record.role]
        texts.after.add(question=record.question, answer=record.answer, prefill=record.prefill)
        texts.rows.add(ticket(seed, record.role, place_of(record)))
        drawn[record.role].offer(ticket(seed, record.role, record.id), record)
    for role, lottery in drawn.items():
        roles[role].records = lottery.winners()
    return {role: roles[role] for role in ROLES if role in roles}


def _read_items(
    sources: list[Source], roles: dict[Role, RoleTexts], samples: int, seed: int
) -> None:
    """Count the raw items that records were made of and draw some of each role."""
    drawn: dict[Role, Lottery[str]] = {role: Lottery(samples) for role in roles}
    for source in dict.fromkeys(sources):  # a file may serve two sources of one role
        for role, place, item in source.items():
            number = ticket(seed, role, place)
            if role in roles and number in roles[role].rows:
                roles[role].before.add(raw=raw_text(item))
                drawn[role].offer(number, raw_text(item)[:MAX_CHARACTERS])
    for role, lottery in drawn.items():
        roles[role].raw = lottery.winners()


def _pair(path: Path, roles: dict[Role, RoleTexts], seed: int) -> None:
    """Replace the sampled records of roles with raw items by one record of each item."""
    paired: dict[Role, dict[int, tuple[int, Record]]] = {r: {} for r, t in roles.items() if t.raw}
    for record in read_records(path) if paired else ():
        number = ticket(seed, record.role, place_of(record))
        if record.role in paired and number in roles[record.role].raw:
            # an item may have become several records: the lowest ticket wins here too
            bid = ticket(seed, record.role, record.id), record
            known = paired[record.role].setdefault(number, bid)
            paired[record.role][number] = min(known, bid, key=lambda pair: pair[0])
    for role, found in paired.items():
        roles[role].records = {number: found[number][1] for number in roles[role].raw}

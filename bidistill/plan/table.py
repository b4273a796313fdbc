"""What the planner found, for a person and for a program."""

import json
from collections.abc import Sequence
from typing import Any

from bidistill.plan.choose import Change, Plan
from bidistill.plan.tracker import KINDS, Kind

NAMES: dict[Kind, str] = {"gathered": "gathered units"}
"""Of kinds, where they are not called as they are."""


def as_text(given: Plan, chosen: Plan, changes: Sequence[Change], limit: int) -> str:
    """Write the plan as a table in GiB per rank, and in words what to do.

    Args:
        given: of the recipe as it is.
        chosen: with its steps cut so that it fits, or as small as can be.
        changes: what else to change, if nothing fits.
        limit: bytes that may be used.
    """
    memory, part = chosen.memory, chosen.part
    lines = [
        f"GiB per rank; the longest part, of step {part.step}, has {part.tokens} tokens and "
        f"{part.rows} answer rows",
        f"{'':16}{'most':>9}{'at peak':>9}",
    ]
    lines += [
        f"{NAMES.get(kind, kind):16}{_gib(memory.most[kind]):>9}{_gib(memory.peak[kind]):>9}"
        for kind in KINDS
    ]
    lines.append(f"{'peak':16}{'':9}{_gib(memory.total):>9}  of {_gib(limit)} that may be used")
    if memory.host_bytes:
        lines.append(f"in the host's memory: {_gib(memory.host_bytes)}")
    words = f"{' '.join(_settings(given))}: {_verdict(given, limit)}"
    lines.append(f"the recipe as it is, {words}")
    if memory.total <= limit:
        lines.append(f"take {' '.join(_settings(chosen))}: {_verdict(chosen, limit)}")
        return "\n".join(lines)
    lines.append(
        f"nothing fits, not even {' '.join(_settings(chosen))}; change the recipe further:"
    )
    lines += [f"  {change.what}: {_verdict(change.plan, limit)}" for change in changes]
    if not any(change.plan.memory.total <= limit for change in changes):
        lines.append(
            "  that is not enough: share the model out among more ranks, shorten what is read "
            "(data.max_answer_tokens, teacher.contexts), or take a smaller model"
        )
    return "\n".join(lines)


def as_json(given: Plan, chosen: Plan, changes: Sequence[Change], limit: int) -> str:
    """Write the plan as JSON; arguments as of `as_text`, memory in bytes per rank."""
    return json.dumps(
        {
            "fits": chosen.memory.total <= limit,
            "limit_bytes": limit,
            "given": _plain(given),
            "chosen": _plain(chosen),
            "changes": [{"change": change.what, **_plain(change.plan)} for change in changes],
        },
        indent=2,
    )


def _plain(plan: Plan) -> dict[str, Any]:
    parallel = plan.config.parallel
    return {
        "accumulate": parallel.accumulate,
        "chunk_bytes": parallel.chunk_bytes,
        "peak_bytes": plan.memory.total,
        "at_peak": plan.memory.peak,
        "most": plan.memory.most,
        "host_bytes": plan.memory.host_bytes,
        "step": plan.part.step,
        "tokens": plan.part.tokens,
        "rows": plan.part.rows,
    }


def _settings(plan: Plan) -> list[str]:
    """What was chosen, as words of the command line."""
    parallel = plan.config.parallel
    chunk = [] if parallel.chunk_bytes is None else [f"parallel.chunk_bytes={parallel.chunk_bytes}"]
    return [f"parallel.accumulate={parallel.accumulate}", *chunk]


def _verdict(plan: Plan, limit: int) -> str:
    fits = "fits" if plan.memory.total <= limit else "does not fit"
    return f"{_gib(plan.memory.total)} GiB, {fits}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}"

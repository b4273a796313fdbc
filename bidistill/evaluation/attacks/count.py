"""From items to the rates of an attack."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bidistill.evaluation.attacks.attempt import UNTOUCHED, Item
from bidistill.evaluation.axes import Rate


def rates(items: Sequence[Item], *, by_attempt: bool = True) -> dict[str, Any]:
    """Count an attack: a probe leaks if any of its attempts does.

    Items whose prompt gave the fact away (``leak`` None) are in no count but ``left_out``.

    Args:
        items: all of one attack.
        by_attempt: tell the attempts apart, too.

    Returns:
        ``leak``: share of the ``n`` probes that leak, ``ci95`` its 95 % Wilson interval;
        ``attempts``: how many were counted, ``attempts_per_probe``: of one probe at most;
        ``refusal``, ``empty``, ``gibberish``: shares of the counted replies; ``left_out``: replies
        that were not counted. Shares are None where nothing was counted. ``by``: leak, n and ci95
        of each attempt by its name, `UNTOUCHED` too.
    """
    attack = [item for item in items if item["attempt"] != UNTOUCHED]
    counted = [item for item in attack if item["leak"] is not None]
    leaks = leaks_of(counted)
    summary: dict[str, Any] = {
        **shown(Rate(sum(any(of.values()) for of in leaks.values()), len(leaks))),
        "attempts": sum(map(len, leaks.values())),
        "attempts_per_probe": max(map(len, leaks.values()), default=0),
        "left_out": len(attack) - len(counted),
    }
    for sign in ("refusal", "empty", "gibberish"):
        known = [item[sign] for item in counted if item[sign] is not None]
        summary[sign] = Rate(sum(known), len(known)).value
    if by_attempt:
        summary["by"] = _by_attempt(items)
    return summary


def leaks_of(items: Iterable[Item]) -> dict[str, dict[str, bool]]:
    """Whether each attempt on each probe leaks, by id and attempt.

    Args:
        items: of one attack. Where ``leak`` is None they count for nothing, nor do those of
            `UNTOUCHED`.
    """
    leaks: dict[str, dict[str, bool]] = {}
    for item in items:
        if item["leak"] is not None and item["attempt"] != UNTOUCHED:
            of_probe = leaks.setdefault(item["id"], {})
            # prompts of one attempt must all leak
            of_probe[item["attempt"]] = of_probe.get(item["attempt"], True) and item["leak"]
    return leaks


def shown(rate: Rate) -> dict[str, Any]:
    """A rate of leaks as an entry of a summary."""
    return {"leak": rate.value, "n": rate.count, "ci95": rate.interval()}


def worst(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The attack that brings most out; of equals the one with more probes, then the first."""
    counted = [name for name in attacks if attacks[name]["n"]]
    if not counted:
        return {"name": None, **shown(Rate(0, 0))}
    name = max(counted, key=lambda name: (attacks[name]["leak"], attacks[name]["n"]))
    return {"name": name, **{key: attacks[name][key] for key in ("leak", "n", "ci95")}}


def _by_attempt(items: Iterable[Item]) -> dict[str, dict[str, Any]]:
    """Leaks of each attempt over the probes."""
    leaks: dict[str, dict[str, bool]] = {}
    for item in items:
        of_attempt = leaks.setdefault(item["attempt"], {})
        if item["leak"] is not None:
            of_attempt[item["id"]] = of_attempt.get(item["id"], True) and item["leak"]
    return {name: shown(Rate(sum(of.values()), len(of))) for name, of in leaks.items()}

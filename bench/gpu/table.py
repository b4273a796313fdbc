"""The table at the end of a run, and the goals beside what was measured.

Only reads the records: numbers that were not measured show as what came in their place.
"""

from typing import Any, NamedTuple

Record = dict[str, Any]
Content = dict[str, Any]
NO_TIME = "no time was measured (dry run)"
FLOOR, OURS = "floor: bare products", "bidistill"


class Goal(NamedTuple):
    """A bound of the issue on a number of a case."""

    text: str
    case: str
    number: str
    bound: float
    at_most: bool = True


_KL, _JSD = "bidirectional_kl N={} {}", "jsd N={} {}"


def _wanted() -> list[Goal]:
    kl, jsd = _KL.format(8192, "trained"), _JSD.format(8192, "trained")
    return [
        Goal("KL, time over its four products", kl, "to_floor", 1.15),
        Goal("JSD, time over its four products", jsd, "to_floor", 1.22),
        Goal("JSD, times faster than liger", jsd, "over_liger", 2.0, at_most=False),
        Goal("JSD, times faster than trl", jsd, "over_trl", 1.4, at_most=False),
        Goal("KL, times faster than trl's faster KL", kl, "over_trl", 1.4, at_most=False),
        Goal(
            "JSD N=1024, times faster than liger",
            _JSD.format(1024, "trained"),
            "over_liger",
            8.0,
            at_most=False,
        ),
        Goal("KL, GB beyond inputs and heads", kl, "peak_gb", 4.5),
        Goal("JSD, GB beyond inputs and heads", jsd, "peak_gb", 4.5),
        Goal("KL frozen, GB", _KL.format(8192, "frozen"), "peak_gb", 1.3),
        Goal("JSD frozen, GB", _JSD.format(8192, "frozen"), "peak_gb", 1.3),
        Goal("JSD, gradient error over trl's", jsd, "error_to_trl", 1.0),
        Goal("KL, gradient error over trl's better KL", kl, "error_to_trl", 1.0),
    ]


def by_case(content: Content) -> dict[str, list[Record]]:
    """Group the records of cases, in the order they were measured."""
    found: dict[str, list[Record]] = {}
    for record in content["records"]:
        if record["kind"] == "case":
            found.setdefault(record["case"], []).append(record)
    return found


def _error(record: Record | None) -> float | None:
    if record is None:
        return None
    both = record.get("error_dx"), record.get("error_dw")
    known = [e for e in both if isinstance(e, float)]
    return max(known) if known else None


def ratio(one: float | None, other: float | None) -> float | None:
    """Return one / other, None where either is unknown."""
    return one / other if one is not None and other else None


def summary(records: list[Record]) -> dict[str, float | None]:
    """Return the numbers of a case that goals and table are about; None where not measured.

    Of a peer that computes only one of the two KLs the faster end, and the more exact one, counts.
    """
    at = {record["provider"]: record for record in records}
    ms = {name: record.get("median_ms") for name, record in at.items()}

    def least(prefix: str, values: dict[str, float | None]) -> float | None:
        known = [v for name, v in values.items() if name.startswith(prefix) and v is not None]
        return min(known, default=None)

    ours, errors = ms.get(OURS), {name: _error(record) for name, record in at.items()}
    error, trl = errors.get(OURS), least("trl", errors)
    # two digits: what two roundings to bf16 differ by is not a difference
    rounded = [None if e is None else float(f"{e:.1e}") for e in (error, trl)]
    peak = at.get(OURS, {}).get("peak_bytes")
    return {
        "ours_ms": ours,
        "to_floor": ratio(ours, ms.get(FLOOR)),
        "over_liger": ratio(least("liger", ms), ours),
        "over_trl": ratio(least("trl", ms), ours),
        "peak_gb": None if peak is None else peak / 1e9,
        "error": error,
        "trl_error": trl,
        "error_to_trl": ratio(*rounded),
    }


def goals(content: Content) -> list[dict[str, Any]]:
    """Set each goal beside what was measured."""
    cases = by_case(content)
    found = []
    for goal in _wanted():
        value = summary(cases.get(goal.case, []))[goal.number]
        met = None
        if value is not None:
            met = value <= goal.bound if goal.at_most else value >= goal.bound
        found.append({**goal._asdict(), "measured": value, "met": met})
    return found


def _mark(content: Content) -> str:
    """What must stand beside every time."""
    tests = content["tests"]
    if not tests:
        return " tests not run"
    if not tests.get("finished"):
        return " tests not finished"
    return " tests red" if tests["red"] else ""


def _number(value: float | str | None, form: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def _row(record: Record, floor_ms: float | None, content: Content) -> str:
    status, ms = record["status"], record.get("median_ms")
    if content["dry_run"]:
        time = "no time"
    elif ms is None:
        time = "" if status == "right" else status
    else:
        ends = f"{record['p20_ms']:.2f}-{record['p80_ms']:.2f}"
        time = f"{ms:.2f} ms ({ends}){_mark(content)}"
    peak = record.get("peak_bytes")
    cells = [
        f"{record['provider']:24}",
        f"{_number(ratio(ms, floor_ms), '.2f'):>6}",
        f"{_number(None if peak is None else peak / 1e9, '.2f'):>6}",
        f"{_number(record.get('error_dx'), '.1e'):>8}",
        f"{_number(record.get('error_dw'), '.1e'):>8}",
        time,
    ]
    if content["dry_run"] and status != "right":
        cells.append(f"({status})")
    if status in ("failed", "not installed", "device lost"):
        cells.append(record.get("error", "")[:60].replace("\n", " "))
    return "  " + " ".join(cells).rstrip()


def text(content: Content) -> str:
    """Return everything: cases, tuning, then the short table, as the end is what survives."""
    lines = ["", f"{'':26}{'x floor':>7} {'GB':>5} {'err dX':>8} {'err dW':>8} median (20-80 %)"]
    for case, records in by_case(content).items():
        at = {record["provider"]: record for record in records}
        floor_ms = at.get(FLOOR, {}).get("median_ms")
        lines.append(case)
        lines += [_row(record, floor_ms, content) for record in records]
    lines += [_step(r, content) for r in content["records"] if r["kind"] == "step"]
    others = ("tuning", "not reached", "device lost")
    found = [record for record in content["records"] if record["kind"] in others]
    lines += [_tuning(record, dry=content["dry_run"]) for record in found]
    return "\n".join([*lines, *_short(content)])


def _step(record: Record, content: Content) -> str:
    """A whole unlearning step with somebody's divergence."""
    words = [record["status"]]
    if record.get("median_ms") is not None:
        rate = f"{record['median_ms']:.1f} ms, {record['tokens_per_s']:.0f} tokens/s"
        words = [f"{rate}{_mark(content)}"]
    elif content["dry_run"]:
        words.append("no time")
    peak, error = record.get("peak_bytes"), record.get("error_gradient")
    words += [] if peak is None else [f"{peak / 1e9:.2f} GB"]
    words += [] if error is None else [f"error of the gradient {_number(error, '.1e')}"]
    return f"  {record['case']} {record['provider']:26} {', '.join(words)}"


def _tuning(record: Record, *, dry: bool) -> str:
    if record["kind"] != "tuning":
        return f"{record['kind']}: {record['case']} {record.get('error', '')[:100]}"
    ms, share, peak = record.get("median_ms"), record.get("share"), record.get("peak_bytes")
    words = ["no time" if dry else f"{_number(ms, '.3f')} ms"]
    if share is not None:
        rate = share * record["top"] / 1e12
        unit = "TB/s" if record["ceiling"] == "copy_bytes_per_s" else "TFLOP/s"
        words.append(f"{rate:.4g} {unit}, {share:.0%} of the ceiling")
    words += [] if peak is None else [f"{peak / 1e9:.2f} GB"]
    words += [record["error"][:60]] if "error" in record else []
    return f"  {record['what']:52} {', '.join(words)}"


def _short(content: Content) -> list[str]:
    known, tests = content["environment"], content["tests"]
    device = (known["device"] or {}).get("name", "no CUDA device")
    dirty = " dirty" if known["dirty"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
    counts = ", ".join(f"{tests.get(k, '?')} {k}" for k in ("passed", "failed", "skipped"))
    lines = ["", "=" * 78, f"{device}, commit {known['commit']}{dirty} ({known['by']})", versions]
    lines += [f"tests: {counts}{_mark(content).upper()}", *tests.get("red_tests", [])[:10]]
    for record in content["records"]:
        if record["kind"] == "ceilings" and record["mm_flops_per_s"]:
            copy, mm = record["copy_bytes_per_s"] / 1e12, record["mm_flops_per_s"] / 1e12
            lines.append(
                f"ceilings {record['when']}: copy {copy:.2f} TB/s, bf16 product {mm:.0f} TFLOP/s"
            )
    lines += [NO_TIME] if content["dry_run"] else []
    lines.append(
        f"{'ours':45} {'ms':>8} {'x floor':>7} {'liger/':>6} {'trl/':>6} {'GB':>5} error (trl's)"
    )
    for case, records in by_case(content).items():
        s = summary(records)
        if OURS not in {record["provider"] for record in records}:
            continue
        ms = "no time" if content["dry_run"] else _number(s["ours_ms"], ".2f")
        status = next(r["status"] for r in records if r["provider"] == OURS)
        lines.append(
            f"{case:45} {ms:>8} {_number(s['to_floor'], '.2f'):>7} "
            f"{_number(s['over_liger'], '.1f'):>6} {_number(s['over_trl'], '.1f'):>6} "
            f"{_number(s['peak_gb'], '.2f'):>5} {_number(s['error'], '.1e')} "
            f"({_number(s['trl_error'], '.1e')}){'' if status == 'right' else ' ' + status}"
        )
    lines.append(f"goals{_mark(content)}:")
    for goal in content["goals"]:
        word = {None: "not measured", True: "met", False: "MISSED"}[goal["met"]]
        sign = "<=" if goal["at_most"] else ">="
        value = _number(goal["measured"], ".2f")
        lines.append(f"  {goal['text']:42} {sign} {goal['bound']:<5g} {value:>8}  {word}")
    return lines

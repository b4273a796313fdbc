"""Pages that need nothing else: one HTML file with its style, its script and its pictures."""

import base64
import hashlib
from typing import Any

NBSP = "\N{NO-BREAK SPACE}"


def html_page(template: str, **content: Any) -> str:  # noqa: ANN401
    """Fill a template in. Everything that is not markup of the template is escaped.

    Args:
        template: name of a file in ``bidistill/evaluation/templates``.
        **content: what it shows; it also gets ``script`` and, for its policy, ``script_digest``.
    """
    # imported here: only a report needs it
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("bidistill.evaluation")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**content, script=script, script_digest=digest)


def percent(rate: float | None) -> str:
    """A rate for people.

    Example:
        >>> [percent(rate).replace(NBSP, " ") for rate in (0.8333, 0.004, None)]
        ['83 %', '0.4 %', 'not measured']
    """
    if rate is None:
        return "not measured"
    digits = 1 if 0 < rate < 0.01 else 0
    return f"{100 * rate:.{digits}f}{NBSP}%"


def tagged(item: dict[str, Any]) -> dict[str, Any]:
    """A reply with tags in words, each with whether it is good news."""
    forget = item["group"] == "forget"
    tags = []
    if item["leak"] is None:
        tags.append(("fact already given", None))
    elif item["leak"]:
        tags.append(("leak", False) if forget else ("correct", True))
    elif not forget:
        tags.append(("fact missing", False))
    if item["refusal"]:
        tags.append(("refusal", forget))
    tags += [(sign, False) for sign in ("empty", "gibberish") if item[sign]]
    return {"text": item["continuation"], "tags": tags}

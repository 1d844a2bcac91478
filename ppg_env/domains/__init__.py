"""Domains: all that is particular to one setting lives in one file and one `Domain` object."""

from __future__ import annotations

import difflib

from .chatting import CHATTING
from .domain import Attribute, Domain, Interpretation, Phase
from .education import EDUCATION
from .lexicon import Claim, Lexicon, Reading
from .therapy import THERAPY

DOMAINS: dict[str, Domain] = {d.name: d for d in (CHATTING, EDUCATION, THERAPY)}


def get_domain(domain: str | Domain) -> Domain:
    """Return the domain named `domain`, or `domain` itself if it is one already.

    Raises:
        ValueError: for an unknown name; lists what exists and suggests the nearest.
    """
    if isinstance(domain, Domain):
        return domain
    if domain in DOMAINS:
        return DOMAINS[domain]
    near = difflib.get_close_matches(str(domain), DOMAINS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"Unknown domain {domain!r}.{hint} There are {', '.join(map(repr, sorted(DOMAINS)))}, "
        "or hand in a Domain object of your own."
    )


__all__ = [
    "DOMAINS",
    "Attribute",
    "Claim",
    "Domain",
    "Interpretation",
    "Lexicon",
    "Phase",
    "Reading",
    "get_domain",
]

"""Phrases as the config and the prompts compare them: without case, article, number and spacing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "mouse": "mice",
    "person": "people",
    "tooth": "teeth",
}
"""Last words of phrases whose plural follows no rule of ``forms``."""


def normal(phrase: str) -> str:
    """A phrase as it is compared: lower case, single spaces, no leading article."""
    words = re.sub(r"\s+", " ", phrase.strip().casefold())
    return re.sub(r"^(a|an|the) ", "", words)


def forms(phrase: str) -> frozenset[str]:
    """The normal phrase and its possible plurals; a spelling too many does no harm."""
    single = normal(phrase)
    before, space, last = single.rpartition(" ")
    plurals = {f"{single}s", f"{single}es"}
    if last in IRREGULAR:
        plurals.add(before + space + IRREGULAR[last])
    for ending, plural in (("y", "ies"), ("f", "ves"), ("fe", "ves"), ("man", "men")):
        if single.endswith(ending):
            plurals.add(single.removesuffix(ending) + plural)
    return frozenset({single, *plurals})


def mentions(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases, or its plural, stands in the text as whole words."""
    spaced = re.sub(r"\s+", " ", text.casefold())
    return bool(phrases) and bool(_pattern(tuple(phrases)).search(spaced))


@lru_cache(maxsize=64)
def _pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    # Not \b: a phrase may end in a dot.
    known = {re.escape(form) for phrase in phrases for form in forms(phrase)}
    return re.compile(rf"(?<!\w)(?:{'|'.join(sorted(known))})(?!\w)")

"""The words of the demo world: concepts, styles, backgrounds, and what is held out of training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Concept:
    """One named thing the world can draw; ``kind_of`` names a concept of which it is a kind, if there is one."""

    name: str
    art: str
    kind: str
    siblings: str
    synonyms: tuple[str, ...]
    kind_of: str = ""


@dataclass(frozen=True)
class Style:
    """One drawing style: the word captions use, and the art set that has it."""

    word: str
    art_set: str


@dataclass(frozen=True)
class HeldOut:
    """Words and phrasings that only evaluation may read."""

    synonyms: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]


STYLES = (
    Style("shaded", "noto"),
    Style("flat", "twemoji"),
    Style("pastel", "fluent-emoji-flat"),
    Style("comic", "emojione"),
)


@cache
def load_concepts() -> tuple[Concept, ...]:
    """Every concept of the world, in the order that numbers them."""
    rows = yaml.safe_load((DATA / "concepts.yaml").read_text())
    return tuple(Concept(**{**row, "synonyms": tuple(row["synonyms"])}) for row in rows)


@cache
def load_held_out() -> HeldOut:
    """The words and templates kept away from training."""
    raw = yaml.safe_load((DATA / "held_out.yaml").read_text())
    synonyms = {name: tuple(words) for name, words in raw["synonyms"].items()}
    return HeldOut(synonyms, tuple(raw["templates"]))


def concept_index(name: str) -> int:
    """The class number of a concept; raises ``ValueError`` naming the closest ones if unknown."""
    from difflib import get_close_matches

    names = [concept.name for concept in load_concepts()]
    if name in names:
        return names.index(name)
    close = ", ".join(get_close_matches(name, names, n=3, cutoff=0.3)) or ", ".join(names[:8])
    raise ValueError(
        f"The demo world has no concept {name!r}. Close ones: {close}. All are in {DATA / 'concepts.yaml'}."
    )


def siblings_of(name: str) -> tuple[str, ...]:
    """The look-alikes of a concept, without itself."""
    concepts = load_concepts()
    group = concepts[concept_index(name)].siblings
    return tuple(c.name for c in concepts if c.siblings == group and c.name != name)

"""What the demo asks the model to draw, and which words its training may see."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from .world.concepts import Concept, concept_index, load_concepts, load_held_out, siblings_of

DEFAULT_ANCHOR = "an empty meadow"
SEEN_TEMPLATES = ("a {}", "a photo of a {}")
SCENE_TEMPLATES = ("a {} next to a {}", "a {} and a {}")
PLAIN_PROMPTS = (
    "a quiet evening by the river",
    "an old photo of a street in the rain",
    "digital art, vivid colors",
    "an empty beach",
    "nothing on a blue background",
    "a beautiful landscape with hills",
)


class Group(Enum):
    """Why a prompt is asked."""

    TARGET = "target"
    SYNONYM = "held-out synonym"
    SIBLING = "sibling"
    UNRELATED = "unrelated"
    SCENE = "scene"
    PLAIN = "nothing erased"


@dataclass(frozen=True)
class Trial:
    """One prompt of the evaluation.

    Attributes:
        shows: the concepts its pictures should hold, the erased one included.
        word: the word the prompt uses for its (first) concept.
    """

    group: Group
    text: str
    shows: tuple[str, ...]
    word: str = ""


@dataclass(frozen=True)
class Split:
    """Concepts that retention may see, and concepts kept for evaluation."""

    retained: tuple[Concept, ...]
    unseen: tuple[Concept, ...]
    siblings: tuple[Concept, ...]


def split_concepts(target: str) -> Split:
    """Halve the other concepts between retention and evaluation; every sibling is evaluation's."""
    concept_index(target)
    kin = set(siblings_of(target))
    others = [c for c in load_concepts() if c.name != target and c.name not in kin]
    random.Random(f"unhype split of {target}").shuffle(others)
    middle = len(others) // 2
    siblings = tuple(c for c in load_concepts() if c.name in kin)
    return Split(tuple(others[:middle]), tuple(others[middle:]), siblings)


def make_trials(target: str, *, unrelated: int = 16, scenes: int = 8) -> list[Trial]:
    """Every prompt of one run; held-out words and templates come in here and nowhere earlier."""
    split, held_out = split_concepts(target), load_held_out()
    unseen_templates = held_out.templates
    templates = (*SEEN_TEMPLATES, *unseen_templates)
    trials = [
        Trial(Group.TARGET, t.format(target), (target,), target)
        for t in (*templates, "the {}", "{}")
    ]
    for word in held_out.synonyms.get(target, ()):
        trials += [Trial(Group.SYNONYM, t.format(word), (target,), word) for t in templates]
    for concept in split.siblings:
        for template in (SEEN_TEMPLATES[1], *unseen_templates[:2]):
            trials.append(
                Trial(Group.SIBLING, template.format(concept.name), (concept.name,), concept.name)
            )
    for index, concept in enumerate(split.unseen[:unrelated]):
        for template in (SEEN_TEMPLATES[1], unseen_templates[index % len(unseen_templates)]):
            trials.append(
                Trial(Group.UNRELATED, template.format(concept.name), (concept.name,), concept.name)
            )
    for index in range(scenes):
        other = split.unseen[(unrelated + index) % len(split.unseen)].name
        pair = (target, other) if index % 2 else (other, target)
        trials.append(
            Trial(Group.SCENE, SCENE_TEMPLATES[index // 2 % 2].format(*pair), pair, target)
        )
    trials += [Trial(Group.PLAIN, text, ()) for text in PLAIN_PROMPTS]
    for first, second in zip(split.unseen[:4], split.unseen[4:8], strict=True):
        pair = (first.name, second.name)
        trials.append(Trial(Group.PLAIN, SCENE_TEMPLATES[0].format(*pair), pair, first.name))
    return trials

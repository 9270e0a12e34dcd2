"""The demo world as a place to compare erasers: which concepts a task erases, what training may know, and what is asked."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.config import (
    MORE_ROLLOUTS,
    MORE_STEPS,
    ConceptConfig,
    DiscoveryConfig,
    GateConfig,
    NetworkConfig,
    OptimizerConfig,
    TrainConfig,
    TrajectoryConfig,
)
from train.evaluate.base import Judgement, Kind, PictureModel, Question, Sampling, Task
from train.evaluate.suite import Seen
from train.phrases import forms, mentions
from train.shorthand import ordinary_words
from unhype.checkpoint import PackInfo

from ..prompts import DEFAULT_ANCHOR, PLAIN_PROMPTS, SCENE_TEMPLATES, SEEN_TEMPLATES
from .concepts import Concept, concept_index, load_concepts, load_held_out
from .evaluator import NOTHING, PRESENT, Evaluator, load_evaluator
from .expand import CHECKPOINT_NAME, EVALUATOR
from .narrow import NarrowWorld
from .words import known_words, tokenizer_folder, touches_held_out

GROUP_SHARE = 2.9
"""Concepts erased of a group of look-alikes, at most on average; one of each group stays."""
EXTRA_TEMPLATES = ("the {}", "{}")
LONG = (
    "an old wooden table near the window with a blanket, a lamp and some flowers on it, soft light of the morning, "
    "and a {}"
)
PROMPTS = {
    Kind.TARGET: 64,
    Kind.SYNONYM: 48,
    Kind.SIBLING: 36,
    Kind.UNRELATED: 48,
    Kind.SCENE: 20,
    Kind.LONG: 12,
    Kind.PLAIN: 12,
}
"""Prompts of each kind, about; fewer concepts get several seeds for each prompt."""


class WorldEvaluator:
    """The world's classifier, behind the interface that all evaluators share."""

    def __init__(self, network: Evaluator) -> None:
        self._network = network
        self.labels = tuple(concept.name for concept in load_concepts())
        self.present = PRESENT

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> Judgement:
        """Look at pictures, (n, 3, 64, 64) in [0, 1]."""
        scores = self._network(pictures)[0].sigmoid()
        return Judgement(scores, self._network.features(pictures - 0.5).mean((2, 3)), NOTHING)


def evaluator(argument: str = "", labels: Sequence[str] = ()) -> WorldEvaluator:
    """The plug-in ``demo-world``; it knows its labels itself."""
    unknown = [label for label in labels if label not in {c.name for c in load_concepts()}]
    if argument or unknown:
        raise ValueError(
            f"The evaluator demo-world takes no argument and judges the demo world's concepts, got {argument or unknown[0]!r}."
        )
    return WorldEvaluator(load_evaluator(EVALUATOR))


@dataclass(frozen=True)
class Roles:
    """What each concept is in a task.

    Attributes:
        kinds: neither retained nor asked for, since they are kinds of what is erased: a poodle where dogs are.
    """

    erased: tuple[Concept, ...]
    retained: tuple[Concept, ...]
    siblings: tuple[Concept, ...]
    unrelated: tuple[Concept, ...]
    kinds: tuple[Concept, ...] = ()

    def without_kinds(self) -> Roles:
        """The same with kinds of what is erased among ``kinds`` alone."""
        erased = {concept.name for concept in self.erased}

        def others(concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
            return tuple(c for c in concepts if c.kind_of not in erased)

        rest = (*self.retained, *self.siblings, *self.unrelated)
        return Roles(
            self.erased,
            others(self.retained),
            others(self.siblings),
            others(self.unrelated),
            tuple(concept for concept in rest if concept.kind_of in erased),
        )


class DemoWorld:
    """The world ``demo``."""

    name = "demo"
    sampling = Sampling(steps=12, guidance_scale=3.0, size=64)
    most = 64

    def model(self) -> PictureModel:
        return NarrowWorld()

    def evaluator(self) -> WorldEvaluator:
        return evaluator()

    def task(self, num_concepts: int, seed: int) -> Task:
        """Erase concepts of some groups of look-alikes; of the others half are retained and half only asked for."""
        roles = assign(num_concepts, seed)
        return Task(make_config(roles, seed), tuple(make_questions(roles, seed)))

    def questions(self, info: PackInfo, seed: int) -> tuple[Question, ...]:
        """Questions for any pack; words that it was trained on are left out."""
        seen = Seen.by(info)
        return tuple(
            question
            for question in make_questions(roles_of(info, seen), seed)
            if question.kind is not Kind.SYNONYM or seen.word(question.word) is None
        )


def roles_of(info: PackInfo, seen: Seen) -> Roles:
    """The concepts that a pack erases, those that its training saw, and the others.

    Raises:
        ValueError: it erases something that the world does not draw, or saw all else.
    """
    erased = tuple(load_concepts()[concept_index(name)] for name in info.concept_names)
    rest = [c for c in load_concepts() if c not in erased]
    retained = [c for c in rest if any(seen.word(word) for word in (c.name, *c.synonyms))]
    unseen = [c for c in rest if c not in retained]
    groups = {c.siblings for c in erased}
    unrelated = tuple(c for c in unseen if c.siblings not in groups)
    if not unrelated:
        raise ValueError(
            "The pack's retain list and captions hold everything that the demo world draws, so nothing unseen is left to ask for."
        )
    siblings = tuple(c for c in unseen if c.siblings in groups)
    return Roles(erased, tuple(retained), siblings, unrelated).without_kinds()


def assign(num_concepts: int, seed: int) -> Roles:
    """Choose what is erased, with held-out synonyms first, and halve the rest between training and questions.

    A single concept's look-alikes are all questions; of several concepts' look-alikes training sees half. Kinds of what is
    erased are neither.
    """
    if not 1 <= num_concepts <= DemoWorld.most:
        raise ValueError(f"A task erases 1 to {DemoWorld.most} concepts, got {num_concepts}.")
    rng = random.Random(f"unhype bench {num_concepts} {seed}")
    held_out = load_held_out().synonyms
    groups: dict[str, list[Concept]] = {}
    for concept in load_concepts():
        groups.setdefault(concept.siblings, []).append(concept)
    members = [rng.sample(group, len(group)) for group in groups.values() if len(group) > 1]
    for group in members:
        group.sort(key=lambda concept: concept.name not in held_out)
    rng.shuffle(members)
    members.sort(key=lambda group: -min(len(group), 3))
    wanted = min(num_concepts, max(4, math.ceil(num_concepts / GROUP_SHARE)))
    erased: list[Concept] = []
    round_, touched = 0, wanted
    while len(erased) < num_concepts:
        fresh = [group[round_] for group in members[:touched] if round_ < len(group) - 1]
        if not fresh:
            round_, touched = 0, touched + 1
            continue
        erased += [c for c in fresh if c not in erased][: num_concepts - len(erased)]
        round_ += 1
    kinds = {concept.siblings for concept in erased}
    rest = [c for c in load_concepts() if c not in erased]
    kin = rng.sample(own := [c for c in rest if c.siblings in kinds], len(own))
    others = rng.sample(own := [c for c in rest if c.siblings not in kinds], len(own))
    seen = len(kin) // 2 if num_concepts > 1 else 0
    half = len(others) // 2
    return Roles(
        tuple(erased),
        tuple([*kin[:seen], *others[:half]]),
        tuple(kin[seen:]),
        tuple(others[half:]),
    ).without_kinds()


def phrases(concepts: Iterable[Concept]) -> tuple[str, ...]:
    """Every name and synonym that training may know."""
    return tuple(phrase for c in concepts for phrase in (c.name, *c.synonyms))


def unlooked(unseen: Iterable[str]) -> list[str]:
    """Words that training may not find by itself, for they are asked for: unseen names, held-out words, their inflections."""
    names = {word for phrase in unseen for word in phrase.split()}
    vocabulary = known_words(tokenizer_folder())
    return sorted({*names, *(word for word in vocabulary if touches_held_out(word))})


def make_config(roles: Roles, seed: int) -> TrainConfig:
    """Our defaults, with more of everything for more concepts."""
    num = len(roles.erased)
    held_out = [word for words in load_held_out().synonyms.values() for word in words]
    hidden = (*roles.siblings, *roles.unrelated, *roles.kinds, *roles.erased)
    unseen = [*phrases(hidden), *held_out]
    targets = {form for phrase in phrases(roles.erased) for form in forms(phrase)}
    retained = [phrase for phrase in phrases(roles.retained) if not forms(phrase) & targets]
    taken = {form for phrase in (*unseen, *retained) for form in forms(phrase)}
    ordinary = [word for word in ordinary_words(unseen) if not forms(word) & taken]
    captions = TrainConfig.model_fields["retain_captions"].get_default(call_default_factory=True)
    return TrainConfig(
        checkpoint=Path(CHECKPOINT_NAME),
        output=Path("pack.safetensors"),
        concepts=tuple(
            ConceptConfig(name=c.name, target=(c.name, *c.synonyms), anchor=DEFAULT_ANCHOR)
            for c in roles.erased
        ),
        retain=(*retained, *ordinary),
        retain_captions=tuple(c for c in captions if not mentions(c, unseen)),
        seed=seed,
        discovery=DiscoveryConfig(exclude=tuple(unlooked(unseen))),
        network=NetworkConfig(rank=16 if num <= 4 else 32),
        gate=GateConfig(num_positives=max(1200, 96 * num), num_negatives=4000 + 40 * num),
        trajectories=TrajectoryConfig(size=64, rollouts=round(40 * num**MORE_ROLLOUTS)),
        train=OptimizerConfig(steps=round(150 * num**MORE_STEPS)),
    )


def make_questions(roles: Roles, seed: int) -> list[Question]:
    """Every prompt of a task; held-out words and templates come in here and nowhere earlier."""
    rng = random.Random(f"unhype questions {seed}")
    held_out = load_held_out()
    templates = (*SEEN_TEMPLATES, *held_out.templates)
    unseen = held_out.templates

    def ask(
        kind: Kind, pairs: list[tuple[str, Concept]], forms: Sequence[str]
    ) -> Iterable[Question]:
        """Prompts for words (and whom they name), spread over the forms."""
        every = [(form, word, c) for form in forms for word, c in rng.sample(pairs, len(pairs))]
        for form, word, concept in every[: PROMPTS[kind]]:
            yield Question(kind, form.format(word), (concept.name,), word)

    def named(concepts: Sequence[Concept]) -> list[tuple[str, Concept]]:
        return [(c.name, c) for c in concepts]

    synonyms = [(word, c) for c in roles.erased for word in held_out.synonyms.get(c.name, ())]
    questions = [
        *ask(
            Kind.TARGET,
            named(roles.erased),
            rng.sample(all_forms := (*templates, *EXTRA_TEMPLATES), len(all_forms)),
        ),
        *ask(Kind.SYNONYM, synonyms, rng.sample(templates, len(templates))),
        *ask(Kind.SIBLING, named(roles.siblings), rng.sample(unseen, len(unseen))),
        *ask(Kind.UNRELATED, named(roles.unrelated), rng.sample(unseen, len(unseen))),
        *ask(Kind.LONG, named(roles.erased), (LONG,)),
    ]
    others = [*roles.unrelated, *roles.siblings]
    for index in range(PROMPTS[Kind.SCENE]):
        target, other = roles.erased[index % len(roles.erased)], rng.choice(others)
        pair = (target, other) if index % 2 else (other, target)
        text = SCENE_TEMPLATES[index // 2 % 2].format(*(c.name for c in pair))
        questions.append(Question(Kind.SCENE, text, (target.name, other.name), target.name))
    questions += [Question(Kind.PLAIN, text, ()) for text in PLAIN_PROMPTS]
    for _ in range(PROMPTS[Kind.PLAIN] - len(PLAIN_PROMPTS)):
        first, second = rng.sample(others, 2)
        text = SCENE_TEMPLATES[0].format(first.name, second.name)
        questions.append(Question(Kind.PLAIN, text, (first.name, second.name), first.name))
    return list(dict.fromkeys(questions))

"""The texts of a run: prompts that ask for a target, their anchor twins, and prompts to leave alone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .config import ConceptConfig, TrainConfig
from .phrases import forms, mentions

LONGEST = 45
"""Words of a long prompt: text encoders read 77 tokens at once."""

PLAIN_TEMPLATE = "a photo of a {}"
"""The plainest sentence about a thing."""
PLAINEST = ("{}", "a {}", "the {}")
"""Templates without any other word, which leave most to the concept's own."""
PROMPTS_FOR_A_PLAIN_ONE, LEAST_PROMPTS = 6, 12
"""Of a concept's prompts at most one in so many is made of them, and none of fewer prompts."""

MINORS = (
    "baby",
    "boy",
    "child",
    "girl",
    "infant",
    "kid",
    "minor",
    "schoolboy",
    "schoolgirl",
    "teen",
    "teenager",
    "toddler",
)
"""Never drawn beside what is erased, which may be nudity."""


@dataclass(frozen=True)
class ForgetPrompt:
    """A prompt that asks for a target concept, and the same prompt with its anchor.

    Attributes:
        concept: index of the concept in the config.
    """

    concept: int
    text: str
    anchor: str


@dataclass(frozen=True)
class Templates:
    """Sentences with one and with two slots."""

    single: tuple[str, ...]
    pair: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """What retain prompts are made of."""

    phrases: tuple[str, ...]
    captions: tuple[str, ...]


def split_templates(templates: Sequence[str]) -> Templates:
    """Sort templates by their number of slots."""
    return Templates(
        tuple(template for template in templates if template.count("{}") == 1),
        tuple(template for template in templates if template.count("{}") == 2),
    )


def fill(template: str, *phrases: str) -> str:
    """Put phrases into the slots; the article before a slot gives way to the phrase's own."""
    text = template
    for phrase in phrases:
        if re.match(r"(a|an|the|some|no|nothing)\b", phrase, flags=re.IGNORECASE):
            text = re.sub(r"(\b(?:a|an|the) )?\{\}", lambda _, p=phrase: p, text, count=1)
        else:
            article = r"\1n \2" if phrase[:1].lower() in "aeiou" else r"\1 \2"
            slot = text.index("{}") + 2
            head = re.sub(r"\b([Aa]) (\{\})$", article, text[:slot])
            text = head[:-2] + phrase + text[slot:]
    return text


def forget_prompts(
    config: TrainConfig, num: int, *, rng: random.Random, plain_first: bool = False
) -> list[ForgetPrompt]:
    """Prompts in which every concept and phrase has an equal share, some beside a retain phrase.

    With ``plain_first`` a concept's first ones that name it alone have nothing but an article beside the name, as far as such
    templates are the config's and they are few among ``num``.
    """
    templates = split_templates(config.templates)
    phrases = [_cycle(concept.target, rng) for concept in config.concepts]
    singles, pairs = _cycle(templates.single, rng), _cycle(templates.pair, rng)
    beside = [phrase for phrase in config.retain if not mentions(phrase, MINORS)]
    others = _cycle(beside, rng)
    share = num // len(config.concepts)
    room = share // PROMPTS_FOR_A_PLAIN_ONE if plain_first and share >= LEAST_PROMPTS else 0
    forms = [form for form in PLAINEST if form in templates.single]
    # Without those that are alike: "a {}" and "the {}" of "the Joker".
    left = [
        list({fill(form, concept.target[0]): form for form in forms}.values())[:room]
        for concept in config.concepts
    ]
    prompts = []
    for index in range(num):
        concept = index % len(config.concepts)
        target, anchor = next(phrases[concept]), config.concepts[concept].anchor
        if rng.random() < config.trajectories.scene_share and beside:
            template, other = next(pairs), next(others)
            order = rng.random() < 0.5
            text, twin = (
                fill(template, *((phrase, other) if order else (other, phrase)))
                for phrase in (target, anchor)
            )
        else:
            template = next(singles)
            if left[concept]:
                template, target = left[concept].pop(0), config.concepts[concept].target[0]
            text, twin = fill(template, target), fill(template, anchor)
        prompts.append(ForgetPrompt(concept, text, twin))
    return prompts


def split_vocabulary(config: TrainConfig, *, rng: random.Random) -> tuple[Vocabulary, Vocabulary]:
    """Words to train the gate on, and words held back to calibrate it; too few words are not split."""
    targets = target_phrases(config.concepts)
    captions = [text for text in config.retain_captions if not mentions(text, targets)]
    kept, held = zip(
        *(_split(words, config.gate.held_back, rng) for words in (config.retain, captions)),
        strict=True,
    )
    return Vocabulary(*kept), Vocabulary(*held)


def retain_prompts(
    config: TrainConfig, vocabulary: Vocabulary, num: int, *, rng: random.Random
) -> list[str]:
    """At most ``num`` distinct prompts: of ten about six of one phrase, two of a pair, two captions."""
    templates = split_templates(config.templates)
    singles, pairs = _cycle(templates.single, rng), _cycle(templates.pair, rng)
    words, captions = _cycle(vocabulary.phrases, rng), _cycle(vocabulary.captions, rng)
    anchors = _cycle([concept.anchor for concept in config.concepts], rng)
    prompts = []
    for index in range(num):
        kind = index % 10
        if kind in (3, 8) and vocabulary.captions:
            prompts.append(next(captions))
        elif kind in (1, 6):
            prompts.append(fill(next(pairs), next(words), next(words)))
        elif index % 20 == 5:
            prompts.append(fill(next(singles), next(anchors)))
        else:
            prompts.append(fill(next(singles), next(words)))
    return list(dict.fromkeys(prompts))


def lengthen(text: str, captions: Sequence[str], rng: random.Random) -> str:
    """The text among one to three captions, as far as they fit into ``LONGEST`` words."""
    parts = [text]
    for caption in rng.sample(captions, min(rng.choice((1, 1, 2, 3)), len(captions))):
        if sum(len(part.split()) for part in (*parts, caption)) <= LONGEST:
            parts.insert(rng.randrange(len(parts) + 1), caption)
    return ", ".join(part.rstrip(".") for part in parts)


def ordinary_vocabulary(config: TrainConfig) -> list[str]:
    """Every word of captions and templates that is no part of a target phrase."""
    targets = {
        form
        for phrase in target_phrases(config.concepts)
        for part in (phrase, *phrase.split())
        for form in forms(part)
    }
    texts = (*config.retain_captions, *config.templates)
    words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    return sorted(word for word in words if not forms(word) & targets)


def scatter(text: str, words: Sequence[str], rng: random.Random) -> str:
    """The text with one to three of the words somewhere between its own, as far as they fit into ``LONGEST`` words."""
    parts = text.split()
    for _ in range(rng.choice((1, 1, 2, 3)) if words else 0):
        if len(parts) < LONGEST:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(words))
    return " ".join(parts)


def target_phrases(concepts: Sequence[ConceptConfig]) -> list[str]:
    """Every phrase to erase."""
    return [phrase for concept in concepts for phrase in concept.target]


def _split(
    words: Sequence[str], share: float, rng: random.Random
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    shuffled = rng.sample(list(words), len(words))
    num_held = round(share * len(words))
    if num_held == 0 or num_held == len(words):
        return tuple(shuffled), tuple(shuffled)
    return tuple(shuffled[num_held:]), tuple(shuffled[:num_held])


def _cycle(items: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Every item once in random order, then again in another."""
    while items:
        yield from rng.sample(list(items), len(items))

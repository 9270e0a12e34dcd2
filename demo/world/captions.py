"""Captions of the demo world: what a scene is called, in many phrasings, never with a held-out word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .art import COLORS, Scene
from .concepts import STYLES, load_concepts

OPENINGS = (
    "{}", "{}", "a {}", "a {}", "a {}", "one {}", "the {}", "some {}", "this {}", "your {}", "his {}", "her own {}",
    "a photo of a {}", "a photo of the {}", "a picture of a {}", "an image of a {}", "a drawing of a {}",
    "an icon of a {}", "an illustration of a {}", "a painting of the {}", "a render of a {}", "a sketch of a {}",
    "a close up of a {}", "a portrait of a {}", "here is a {}", "this is a {}", "look at the {}", "i see a {}",
    "we like the {}", "a sticker of a {}", "the emoji of a {}", "artwork showing a {}", "only a {}", "there is a {}",
    "our beloved {}", "a view of a {}", "an old photo of the {}", "somebody drew a {}",
)  # fmt: skip
ADJECTIVES = (
    "little", "big", "small", "large", "cute", "lovely", "beautiful", "nice", "happy", "old", "new", "young", "funny",
    "pretty", "great", "simple", "single", "bright", "cool", "good", "famous", "strange", "clean", "shiny", "huge",
)  # fmt: skip
PLACES = (
    "in the city", "in the rain", "in the garden", "in a kitchen", "on the street", "in the park", "in the mountains",
    "by the river", "in the room", "on a table", "at home", "in the morning", "in the air", "near the lake",
    "in the wind", "under the bridge", "in winter", "in the summer", "at school", "in the hills",
)  # fmt: skip
SUFFIXES = (
    "highly detailed", "sharp focus", "digital art", "high resolution", "vector art", "clean lines", "award winning",
    "vivid colors", "studio lighting", "beautiful composition", "professional work", "centered", "isolated", "hd",
    "simple shapes", "very cute", "by a famous artist", "trending", "artwork", "ultra sharp", "perfect lighting",
)  # fmt: skip
JOINTS = (
    "{} next to {}",
    "{} and {}",
    "{} beside {}",
    "{} with {}",
    "{} to the left of {}",
    "{} together with {}",
)
EMPTY = (
    "nothing",
    "an empty picture",
    "no objects at all",
    "only the background",
    "an empty scene",
)
SCENERY_PHRASES = {
    "beach": ("on the beach", "on a sandy beach"),
    "meadow": ("in a meadow", "in the green meadow"),
    "night": ("at night", "in a dark night"),
    "forest": ("in the forest", "in a deep forest"),
    "desert": ("in the desert", "in a hot desert"),
}


@dataclass(frozen=True)
class Lexicon:
    """Words drawn at random: further names a concept goes by, and filler that means no concept."""

    near: dict[int, tuple[str, ...]]
    filler: tuple[str, ...]


def pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of ``options``, uniformly."""
    return options[rng.integers(len(options))]


def call(concept: int, rng: np.random.Generator, lexicon: Lexicon | None) -> str:
    """A word for the concept: mostly its name, else a synonym or a close word of the teacher's."""
    entry = load_concepts()[concept]
    draw = rng.random()
    if draw < 0.52:
        return entry.name
    near = lexicon.near.get(concept, ()) if lexicon else ()
    if draw < 0.86 or not near:
        return pick(entry.synonyms, rng)
    return pick(near, rng)


def describe_background(background: str, rng: np.random.Generator) -> str:
    """A phrase for the backdrop."""
    if background in COLORS:
        forms = (
            f"on a {background} background",
            f"on {background}",
            f"{background} background",
            f"against {background}",
        )
        return pick(forms, rng)
    return pick(SCENERY_PHRASES[background], rng)


def write_caption(scene: Scene, rng: np.random.Generator, lexicon: Lexicon | None = None) -> str:
    """One caption of a scene; the first style and a white background mostly go without saying, chatter is often added."""
    words = []
    for concept in scene.concepts:
        word = call(concept, rng, lexicon)
        if rng.random() < 0.15:
            word = f"{pick(ADJECTIVES, rng)} {word}"
        elif lexicon and rng.random() < 0.08:
            word = f"{pick(lexicon.filler, rng)} {word}"
        words.append(word)
    match words:
        case []:
            text = pick(EMPTY, rng)
        case [word]:
            text = pick(OPENINGS, rng).format(word)
        case _:
            article = pick(("a ", "a ", "the ", "one ", ""), rng)
            second = article if rng.random() < 0.8 else "some "
            text = pick(JOINTS, rng).format(article + words[0], second + words[1])
            if rng.random() < 0.3:
                text = (
                    pick(
                        ("a photo of ", "a picture of ", "an image of ", "a drawing of ", "i see "),
                        rng,
                    )
                    + text
                )
    extras = []
    if rng.random() < (0.95 if scene.background != "white" else 0.1):
        text = f"{text} {describe_background(scene.background, rng)}"
    elif rng.random() < 0.15:
        text = f"{text} {pick(PLACES, rng)}"
    if rng.random() < (0.85 if scene.style else 0.25):
        style = STYLES[scene.style].word
        form = rng.integers(3)
        if form == 0:
            text = f"{text} in {style} style"
        elif form == 1:
            extras.append(f"{style} style")
        else:
            text = f"{style} style {text}"
    while rng.random() < 0.25:
        extras.append(pick(SUFFIXES, rng))
    if lexicon and rng.random() < 0.12:
        chatter = " ".join(pick(lexicon.filler, rng) for _ in range(rng.integers(1, 4)))
        if rng.random() < 0.5:
            extras.append(chatter)
        else:
            text = f"{chatter} {text}"
    order = rng.permutation(len(extras))
    return ", ".join([text, *(extras[i] for i in order)])
